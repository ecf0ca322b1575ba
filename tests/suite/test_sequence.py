"""Sequences of requests: what each step is given, and what is measured after it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.audit import Audit, Finding
from expunge.core.errors import RequestError, UserError
from expunge.core.hashing import hash_model
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData
from expunge.suite.sequence import RequestSequence
from expunge.train.adapters import has_adapters
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts

REQUESTS = [xp.forget(ids=[0, 1]), xp.forget(where="x > 20 and x < 24"), xp.forget(ids=[1, 40, 41])]


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def problem():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=rng)
    data = xp.Data((x, torch.arange(60) % 3), columns={"x": list(range(60))})
    recipe = xp.ClassifierRecipe(build, data, epochs=2, batch_size=16, lr=0.1)
    return xp.Classification(recipe(data.ids, 0), data, recipe=recipe, name="toy")


class Spy(xp.methods.FineTune):
    """Notes what it is given."""

    name = "spy"
    seen = []  # noqa: RUF012

    def run(self, view, runtime):
        kept = set(view.retain.ids.tolist())
        self.seen.append((hash_model(view.model()), view._forget_ids.tolist(), kept))
        return super().run(view, runtime)


def loss_of(subject):
    ids = subject.splits["forget-train"]
    with torch.no_grad():
        return float(
            subject.problem.each_loss(subject.model, subject.problem.train.fetch(ids)).mean()
        )


def test_each_step_starts_from_the_last_and_never_sees_what_is_gone(problem):
    Spy.seen.clear()
    found = xp.unlearn_sequence(problem, REQUESTS, Spy(epochs=1, lr=0.1))
    everything = set(range(60))
    starts, forgotten, kept = zip(*Spy.seen, strict=True)
    assert list(forgotten) == [[0, 1], [21, 22, 23], [40, 41]]  # 1 is gone before
    assert list(kept) == [
        everything - {0, 1},
        everything - {0, 1, 21, 22, 23},
        everything - {0, 1, 21, 22, 23, 40, 41},
    ]
    ends = [hash_model(o.runnable()) for o in found.outcomes]
    assert starts == (problem.model_hash(), ends[0], ends[1])
    assert [o.record["fingerprint"]["model"] for o in found.outcomes] == list(starts)
    assert found.requests[:2] == tuple(REQUESTS[:2]) and found.requests[2].ids == (40, 41)
    assert len(problem.train) == 60
    # the same one by one
    first = xp.unlearn(problem, REQUESTS[0], Spy(epochs=1, lr=0.1))
    rest = problem.train.only(problem.train.without(torch.tensor([0, 1])))
    second = xp.unlearn(problem.about(first.runnable(), rest), REQUESTS[1], Spy(epochs=1, lr=0.1))
    assert hash_model(second.runnable()) == ends[1]


def test_every_request_is_measured_after_each(problem):
    found = xp.unlearn_sequence(
        problem, REQUESTS, "finetune", audits=["accuracy"], measures={"loss": loss_of}
    )
    rows = found.matrix("loss")
    assert [len(r) for r in rows] == [1, 2, 3]
    covered = [[0, 1], [21, 22, 23], [40, 41]]
    for t, outcome in enumerate(found.outcomes):
        for i in range(t + 1):
            batch = problem.train.fetch(torch.tensor(covered[i]))
            with torch.no_grad():
                wanted = float(problem.each_loss(outcome.runnable(), batch).mean())
            assert rows[t][i] == pytest.approx(wanted, rel=1e-5)
    rest = problem.train.without(torch.tensor([0, 1, 21, 22, 23, 40, 41]))
    batch = problem.train.fetch(rest)
    for value, outcome in zip(found.kept("accuracy/retain-train"), found.outcomes, strict=True):
        with torch.no_grad():
            right = outcome.runnable()(batch.x).argmax(1).eq(batch.y).float().mean()
        assert value == pytest.approx(float(right))
    table = found.table("loss", "accuracy/retain-train").splitlines()
    assert table[0] == "| loss after | 1 | 2 | 3 | accuracy/retain-train |" and len(table) == 5
    assert table[2].startswith(f"| request 1 | {rows[0][0]:.3f} |  |  |")
    with pytest.raises(UserError, match="no finding is called 'nothing'"):
        found.matrix("nothing")


def test_sok_llm_invariant_5_there_is_no_resurgence_where_nothing_changes():
    """Entries are those of i ≤ t, and coming back is the largest rise over a request's first value."""
    found = RequestSequence(requests=())
    values = {(0, 0): 0.2, (1, 0): 0.9, (2, 0): 0.5, (1, 1): 0.3, (2, 1): 0.3, (2, 2): 0.1}
    found.cells = {place: {"f": Finding("f", v)} for place, v in values.items()}
    found.rest = [{"f": Finding("f", 1.0)}] * 3
    assert found.resurgence("f") == [pytest.approx(0.7), 0.0]
    assert found.matrix("f") == [[0.2], [0.9, 0.3], [0.5, 0.3, 0.1]]
    found.cells[1, 0] = found.cells[2, 0] = {"f": Finding("f", None)}
    assert math.isnan(found.resurgence("f")[0])


def test_references_never_saw_what_was_covered_so_far(problem):
    counts = []

    class Count(Audit):
        name, domain, card = "count", "general", xp.audits.Accuracy.card
        needs = xp.Needs(models=1)

        def run(self, subject, references, runtime):
            counts.append([hash_model(r.model) for r in references])
            assert all(r.splits.keys() == subject.splits.keys() for r in references)
            return [Finding("count/all", float(len(references)))]

    xp.unlearn_sequence(problem, REQUESTS[:2], "finetune", audits=[Count()], references=2)
    wanted = []
    for gone in ([0, 1], [0, 1, 21, 22, 23]):
        keep = problem.train.without(torch.tensor(gone))
        wanted.append([hash_model(problem.recipe(keep, seed)) for seed in (1001, 1002)])
    assert counts == [wanted[0], wanted[0], wanted[1], wanted[1], wanted[1]]


def test_adapters_are_merged_before_the_next_request():
    torch.manual_seed(0)
    problem = CausalLM(tiny_llama(16, 2).eval(), tinyfacts.data().train)
    method = xp.methods.GradDiff(epochs=1, lr=1e-2, train="lora(2)")
    found = xp.unlearn_sequence(problem, [xp.forget(ids=[0, 1]), xp.forget(ids=[9])], method)
    assert [o.change.kind for o in found.outcomes] == ["adapter", "adapter"]
    assert not has_adapters(found.outcomes[1].problem.model)
    batch = problem.train.fetch(torch.arange(8))
    with torch.no_grad():
        before, after = (
            problem.token_logits(m, batch)
            for m in (found.outcomes[0].runnable(), found.outcomes[1].problem.model)
        )
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)


def test_data_of_some_samples_alone(problem):
    part = problem.train.only(torch.tensor([5, 2, 50]))
    assert part.ids.tolist() == [2, 5, 50] and part.labels.tolist() == [2, 2, 2]
    assert part.columns["x"].tolist() == [2, 5, 50]
    assert torch.equal(part.fetch(torch.tensor([50])).x, problem.train.fetch(torch.tensor([50])).x)
    pairs = [(torch.full((2,), float(n)), n % 2) for n in range(6)]
    named = xp.Data(_List(pairs), names=[f"n{n}" for n in range(6)]).only(torch.tensor([4, 1]))
    assert named.names == ["n1", "n4"] and named.labels.tolist() == [1, 0]
    assert named.fetch(torch.tensor([4])).x.tolist() == [[4.0, 4.0]]
    facts = tinyfacts.data().train
    some = facts.only(torch.tensor([7, 3]))
    assert isinstance(some, TokenData) and some.ids.tolist() == [3, 7]
    assert torch.equal(some.rows[1].ids, facts.rows[7].ids)
    assert torch.equal(some.alternates[0][2].ids, facts.alternates[3][2].ids)
    assert np.array_equal(some.columns["entity"], [0, 1])


class _List(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


def test_bad_sequences_are_refused_and_shares_are_of_all_data(problem):
    with pytest.raises(RequestError, match="one request at least"):
        xp.unlearn_sequence(problem, [], "finetune")
    with pytest.raises(RequestError, match=r"request 2 .* covers only samples of earlier requests"):
        xp.unlearn_sequence(problem, [REQUESTS[0], xp.forget(ids=[0])], "finetune")
    with pytest.raises(RequestError, match="covers all 60"):
        xp.unlearn_sequence(problem, [xp.forget(ids=list(range(30))), xp.forget(ids=list(range(30, 60)))], "finetune")  # fmt: skip
    share = [REQUESTS[0], xp.forget(fraction=0.1, seed=3)]
    found = xp.unlearn_sequence(problem, share, "finetune").requests[1]
    wanted = set(share[1].resolve(problem.train).tolist()) - {0, 1}
    assert set(found.ids) == wanted  # of all the data, as it was asked
    bare = xp.Classification(problem.model, problem.train)
    with pytest.raises(UserError, match="pass recipe="):
        xp.unlearn_sequence(bare, REQUESTS, "finetune", references=1)
