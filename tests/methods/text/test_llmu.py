"""LLMU: its three terms from the formula, which prompts get which answers, and what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import expunge as xp
from expunge.core.errors import DataError, NeedsError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.llmu import LLMU, other_answers
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.text import Text

FORGET = xp.forget(ids=[0, 3])


class Share(Runtime):
    """One of two processes."""

    number = 0
    processes = 2

    @property
    def rank(self):
        return self.number


def view_of(problem, method, runtime=None):
    return View(problem, FORGET, method.needs, runtime or Runtime())


def by_hand(model, rows):
    """Mean cross-entropy of all answered tokens of some sequences, each by itself."""
    each = []
    for prompt, answer in rows:
        ids = torch.cat([prompt, answer])
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        each += [-logp[t - 1, ids[t]] for t in range(len(prompt), len(ids))]
    return torch.stack(each).mean()


def parts(row):
    return row.prompt, row.answer


def split(batch):
    """Prompt and answer of each row of a batch, without its padding."""
    for ids, mask, y in zip(*batch.x.values(), batch.y, strict=True):
        places = (y != -100).nonzero()[:, 0]
        first, end = int(places[0]), int(mask.sum())
        assert places.tolist() == list(range(first, end)) and torch.equal(
            y[first:end], ids[first:end]
        )
        yield ids[:first], ids[first:end]


@pytest.mark.parametrize("weights", [(0.5, 1.0, 1.0), (0.1, 0.0, 2.0), (0.0, 3.0, 0.0)])
def test_llmu_is_its_formula(tiny, build, weights):
    """Of a model that has moved; lengths differ, so that means of means would show."""
    a, b, c = weights
    method = LLMU(gamma=a, mismatch=b, alpha=c, answers=3, batch_size=2)
    view, model = view_of(tiny, method), build(1)
    text = Text(view, Runtime(), method.original(view, model))
    batches = next(iter(method.pairs(view, Runtime(), 0)))
    found = method.total(text)(model, batches)
    rows = tiny.train.rows
    wanted = -a * by_hand(model, [parts(rows[i]) for i in batches[0].ids.tolist()])
    if b:
        wanted = wanted + b * by_hand(model, split(batches[-1]))
    if c:
        each = []
        for i in batches[1].ids.tolist():
            p, q = (
                m(input_ids=rows[i].ids[None]).logits[0].log_softmax(-1)
                for m in (tiny.model, model)
            )
            start = len(rows[i].prompt) - 1
            each += [(p.exp() * (p - q)).sum(-1)[start:-1]]
        wanted = wanted + c * torch.cat(each).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5)
    for one, other in zip(*(
        torch.autograd.grad(value, list(model.parameters())) for value in (found, wanted)
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert sum(v[0] for v in text.logs.values()) == pytest.approx(float(found.detach()), abs=1e-5)
    assert ("mismatch" in text.logs) == (b > 0) and ("retain" in text.logs) == (c > 0)


def test_the_divergence_has_the_gradient_of_the_cross_entropy(tiny, build, losses):
    """H(p0, p) = KL(p0 ‖ p) + H(p0), at the answered tokens alone."""
    model = build(1)
    _, found = losses(LLMU(), model)
    each, entropy = [], []
    for row in tiny.train.rows[:3]:
        p, q = (m(input_ids=row.ids[None]).logits[0].log_softmax(-1) for m in (tiny.model, model))
        start = len(row.prompt) - 1
        each.append(-(p.detach().exp() * q).sum(-1)[start:-1])
        entropy.append(-(p.detach().exp() * p.detach()).sum(-1)[start:-1])
    wanted = torch.cat(each).mean()
    assert float(found.detach()) == pytest.approx(
        float(wanted.detach() - torch.cat(entropy).mean()), abs=1e-5
    )
    for one, other in zip(*(
        torch.autograd.grad(value, list(model.parameters())) for value in (found, wanted)
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_each_prompt_gets_k_answers_of_retain_samples(tiny):
    method = LLMU(answers=50)
    view = view_of(tiny, method)
    batch = view.forget.fetch(torch.tensor([3, 0]))
    found = other_answers(batch, view.retain, 50, torch.Generator().manual_seed(0))
    rows = tiny.train.rows
    assert found.ids.tolist() == [3, 0] * 50 and len(found) == found.total == 100
    drawn = Counter()
    for i, (prompt, answer) in zip(found.ids.tolist(), split(found), strict=True):
        assert torch.equal(prompt, rows[i].prompt)
        drawn[i, tuple(answer.tolist())] += 1
    assert {answer for _, answer in drawn} == {tuple(rows[i].answer.tolist()) for i in (1, 2)}
    assert len(drawn) == 4 and min(drawn.values()) > 10


def test_processes_share_the_pairs_of_one(tiny):
    method = LLMU(answers=3)

    def pairs_of(runtime):
        view = view_of(tiny, method, runtime)
        batch = view.forget.fetch(torch.tensor([3, 0]))
        found = other_answers(batch, view.retain, 3, torch.Generator().manual_seed(0))
        assert (found.total, found.processes) == (6, runtime.processes)
        return Counter((tuple(p.tolist()), tuple(a.tolist())) for p, a in split(found))

    first, second = Share(), Share()
    second.number = 1
    assert pairs_of(first) + pairs_of(second) == pairs_of(Runtime())
    lone = view_of(tiny, method, second)
    nothing = other_answers(
        lone.forget.fetch(torch.tensor([3])), lone.retain, 3, torch.Generator().manual_seed(0)
    )
    assert len(nothing) == len(nothing.y) == len(nothing.x["input_ids"]) == 0


def test_every_pass_reads_each_forget_sample_once(tiny):
    method = LLMU(batch_size=1, answers=2)
    view = view_of(tiny, method)
    first, second = (list(method.pairs(view, Runtime(), epoch)) for epoch in (0, 1))
    assert sorted(int(f.ids) for f, _, _ in first) == [0, 3]
    assert [o.ids.tolist() for _, _, o in first] == [2 * f.ids.tolist() for f, _, _ in first]
    texts = [[o.x["input_ids"].tolist() for _, _, o in sorted(p, key=lambda b: int(b[0].ids))] for p in (first, second)]  # fmt: skip
    assert texts[0] != texts[1]  # other answers in the next pass
    again = list(method.pairs(view, Runtime(), 0))
    assert [o.x["input_ids"].tolist() for _, _, o in again] == [
        o.x["input_ids"].tolist() for _, _, o in first
    ]


def test_it_changes_answers_and_counts_what_it_reads(tiny):
    method = LLMU(epochs=4, lr=1e-2, answers=3, batch_size=2)
    outcome = xp.unlearn(tiny, FORGET, method)
    assert outcome.cost.samples == 4 * (2 + 2 + 3 * 2) == outcome.cost.gradients
    assert set(outcome.details["losses"]) == {"forget", "retain", "mismatch"}
    batch = tiny.train.fetch(torch.tensor([0, 3]))
    with torch.no_grad():
        before, after = (tiny.each_loss(m, batch).mean() for m in (tiny.model, outcome.runnable()))
    assert after > before
    found = outcome.details["losses"]["mismatch"]
    assert found[-1] < found[0]


def test_without_its_further_terms_it_reads_no_retain_data():
    assert LLMU(mismatch=0, alpha=0).needs.retain is False
    assert LLMU(mismatch=0).needs.retain and LLMU(alpha=0).needs.retain
    assert not LLMU(alpha=0).needs.original and LLMU().needs.original


def test_what_has_no_prompt_or_no_room_is_refused(tiny):
    whole = Tokens(torch.arange(3, 9), torch.ones(6, dtype=torch.bool))
    problem = CausalLM(tiny.model, TokenData([whole, *tiny.train.rows]))
    with pytest.raises(DataError, match="a forget sample is all answer"):
        xp.unlearn(problem, xp.forget(ids=[0]), LLMU())
    xp.unlearn(problem, xp.forget(ids=[0]), LLMU(epochs=1, mismatch=0, lr=1e-2))
    long = [
        Tokens(torch.full((30,), 3), torch.arange(30) >= 28),
        Tokens(torch.full((30,), 3), torch.arange(30) >= 2),
    ]
    problem = CausalLM(tiny.model, TokenData([*tiny.train.rows, *long]))
    with pytest.raises(DataError, match="has 56 tokens, the model's context 32"):
        xp.unlearn(problem, xp.forget(ids=[4]), LLMU())
    with pytest.raises(NeedsError, match="token_"):
        xp.unlearn(xp.Classification(torch.nn.Linear(2, 2), (torch.randn(4, 2), torch.arange(4) % 2)), xp.forget(ids=[0]), LLMU())  # fmt: skip
