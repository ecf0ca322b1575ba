"""code-eraser: the invariants of its card, its losses from the formula, the stop, and what it keeps."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import expunge as xp
from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.runtime import Budget, Runtime
from expunge.core.view import View
from expunge.methods.text.code_eraser import CodeEraser
from expunge.problems.causal_lm import CausalLM
from expunge.problems.segments import accuracies, segments
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.steps import make_optimizer
from expunge.train.text import Text
from expunge.train.token_losses import IGNORED
from expunge.train.until import Goal

PART = xp.forget(ids=[0, 1, 2])
STEPS = {"lr": 1e-2, "epochs": 4, "accuracy": 0.0, "clip": 1e9}


def marked_rows():
    """Texts of unequal lengths with none, one or two secrets; the last one has an answered part only."""
    rng = torch.Generator().manual_seed(5)
    spans = [[(2, 4)], [(1, 3), (5, 8)], [], [(0, 2)], [], [(3, 6)], []]
    rows = []
    for length, pairs in zip((6, 9, 5, 4, 7, 8, 6), spans, strict=True):
        places = torch.arange(length)
        marked = torch.zeros(length, dtype=torch.bool)
        for a, b in pairs:
            marked |= (places >= a) & (places < b)
        ids = torch.randint(3, 40, (length,), generator=rng)
        ids[0] = 3 + len(rows)  # so that each can be known by heart
        answered = places >= (2 if length == 9 else 0)
        rows.append(Tokens(ids, answered, marked if pairs else None))
    return rows


@pytest.fixture(scope="module")
def taught():
    """Weights that know all texts by heart."""
    return {}


@pytest.fixture
def problem(build, taught):
    problem = CausalLM(build(0), TokenData(marked_rows()))
    model, data = problem.model, problem.train
    if not taught:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        batch = data.fetch(data.ids)
        for _ in range(150):
            optimizer.zero_grad()
            problem.each_loss(model, batch).mean().backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
        taught.update(copy.deepcopy(model.state_dict()))
    model.load_state_dict(taught)
    return problem


def text_of(method, problem, request=PART):
    view = View(problem, request, method.needs, Runtime())
    return Text(view, Runtime(), method.original(view, view.model()))


def token_by_token(model, original, row):
    """(is it secret, its loss, KL from the original) of each answered token, one at a time."""
    found = []
    z, z0 = (m(input_ids=row.ids[None]).logits[0].detach() for m in (model, original))
    for t in range(1, len(row)):
        if row.answered[t]:
            p, q = z0[t - 1].log_softmax(-1), z[t - 1].log_softmax(-1)
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            found.append((
                row.marked is not None and bool(row.marked[t]),
                -float(q[row.ids[t]]),
                kl,
            ))
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def forget_by_hand(model, original, rows, gamma, constrain, everything=False):
    each = []
    for row in rows:
        found = [
            (s or everything, loss, kl) for s, loss, kl in token_by_token(model, original, row)
        ]
        secret = mean(loss for s, loss, _ in found if s)
        around = mean(loss for s, loss, _ in found if not s)
        each.append(-secret + gamma * around - constrain * mean(kl for s, _, kl in found if s))
    return mean(each)


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.7, "constrain": 0.4}, {"constrain": 0.0}, {"spans": "all", "constrain": 2.0}])  # fmt: skip
def test_losses_are_their_formulas(problem, build, settings):
    model, method = build(1), CodeEraser(**settings)
    text, rows = text_of(method, problem), problem.train.rows[:3]
    found = method.forget_loss(model, problem.train.fetch(torch.arange(3)), text)
    wanted = forget_by_hand(
        model, problem.model, rows, method.gamma, method.constrain, method.spans == "all"
    )
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_retain_divergence_is_a_sum_or_a_mean(problem, build, reduction):
    model = build(1)
    method = CodeEraser(retain_kl=reduction, constrain=0.3, alpha=2.0)
    batch = problem.train.fetch(torch.arange(1, 7))
    found = method.retain_loss(model, batch, text_of(method, problem))
    kls = [[kl for *_, kl in token_by_token(model, problem.model, row)] for row in problem.train.rows[1:]]  # fmt: skip
    wanted = 0.3 * 2.0 * mean(sum(k) if reduction == "sequence" else mean(k) for k in kls)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    nll = CodeEraser(retain="nll", constrain=0.3, alpha=2.0)
    losses = problem.each_loss(model, batch)
    found = nll.retain_loss(model, batch, text_of(nll, problem))
    torch.testing.assert_close(found, 0.6 * losses.mean())


def test_code_eraser_invariant_4_without_terms_it_is_gradient_ascent_bit_for_bit(problem):
    plain = copy.deepcopy(problem.model)
    optimizer = make_optimizer("adam", plain.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (-problem.each_loss(plain, problem.train.fetch(torch.arange(3))).mean()).backward()
        optimizer.step()
    ours = CodeEraser(**STEPS, gamma=0.0, constrain=0.0, spans="all", batch_size=3, keep="last")
    wanted = hash_model(plain)
    assert xp.unlearn(problem, PART, ours).record["weights"] == wanted
    # all tokens marked is the same, the context's weight then has nothing to act on
    rows = [Tokens(r.ids, r.answered, torch.ones(len(r), dtype=torch.bool)) for r in marked_rows()]
    whole = CausalLM(problem.model, TokenData(rows))
    again = xp.unlearn(whole, PART, dataclasses.replace(ours, spans="marked", gamma=0.5))
    assert again.record["weights"] == wanted


def test_code_eraser_invariant_4_without_a_secret_only_the_context_counts(problem, build):
    model, method = build(1), CodeEraser(gamma=0.25)
    batch = problem.train.fetch(torch.tensor([2]))
    loss = method.forget_loss(model, batch, text_of(method, problem))
    torch.testing.assert_close(loss, 0.25 * problem.each_loss(model, batch).mean())
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_code_eraser_invariant_5_gradients_of_the_logits(problem, build, monkeypatch):
    """None at padding, at positions that predict no answered token; of λ-terms none off secrets."""
    model, kept = build(1), []
    inner = CausalLM.token_logits

    def watched(self, network, batch):
        logits = inner(self, network, batch)
        if logits.requires_grad:
            logits.retain_grad()
            kept.append(logits)
        return logits

    monkeypatch.setattr(CausalLM, "token_logits", watched)
    batch = problem.train.fetch(torch.arange(3))
    gradients = []
    for constrain in (0.0, 0.5):
        method = CodeEraser(constrain=constrain)
        method.forget_loss(model, batch, text_of(method, problem)).backward()
        gradients.append(kept.pop().grad)
    nothing = torch.ones(batch.y.shape, dtype=torch.bool)
    nothing[:, :-1] = batch.y[:, 1:] == IGNORED
    # a row of 9 and one of 5 tokens: padding, and no prediction of a first token
    assert int(nothing.sum()) > 3 + 4
    for gradient in gradients:
        assert not bool(gradient[nothing].any())
        assert bool((gradient[~nothing].abs().amax(-1) > 0).all())
    secret = torch.zeros_like(nothing)
    secret[:, :-1] = problem.marks(batch)[:, 1:] & ~nothing[:, :-1]
    change = (gradients[1] - gradients[0]).abs().amax(-1)
    assert not bool(change[~secret].any()) and bool((change[secret] > 0).all())


def test_code_eraser_invariant_6_at_the_start_divergences_are_zero(problem):
    batch = problem.train.fetch(torch.arange(6))
    gradients = []
    for constrain in (0.0, 5.0):
        model, method = copy.deepcopy(problem.model), CodeEraser(constrain=constrain)
        text = text_of(method, problem, xp.forget(ids=[0, 1, 2, 3, 4, 5]))
        loss = method.forget_loss(model, batch, text)
        loss.backward()
        gradients.append([float(loss.detach()), *(p.grad for p in model.parameters())])
        if constrain:
            model.zero_grad()
            loss = method.retain_loss(model, batch, text)
            loss.backward()
            assert float(loss.detach()) == pytest.approx(0, abs=1e-9)
            assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-6
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_batch_size_does_not_matter(problem, size):
    """One step a phase, over the whole set, also where a phase has fewer samples than pieces."""
    settings = STEPS | {
        "gamma": 0.3,
        "constrain": 0.5,
        "keep": "last",
        "rehearse": 4,
        "step": "sgd",
    }
    whole, pieces = (
        xp.unlearn(problem, PART, CodeEraser(**settings, batch_size=n)) for n in (30, size)
    )
    assert whole.details["steps"] == pieces.details["steps"] == 2 * 4
    for a, b in zip(whole.runnable().parameters(), pieces.runnable().parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    moved = [(a - b).detach() for a, b in zip(whole.runnable().parameters(), problem.model.parameters(), strict=True)]  # fmt: skip
    assert max(float(m.abs().max()) for m in moved) > 1e-4


def test_retain_samples_are_drawn_once(problem, monkeypatch):
    read = []
    inner = CodeEraser.each_retain
    monkeypatch.setattr(
        CodeEraser, "each_retain",
        lambda self, model, batch, text: read.append(batch.ids.tolist()) or inner(self, model, batch, text),
    )  # fmt: skip
    xp.unlearn(problem, PART, CodeEraser(**STEPS, rehearse=1))
    assert len(read) == 4 and len({tuple(r) for r in read}) == 1 and len(read[0]) == 3
    assert not set(read[0]) & {0, 1, 2}


def test_a_forget_and_a_retain_step_take_turns(problem):
    outcome = xp.unlearn(problem, PART, CodeEraser(**STEPS))
    assert outcome.details["steps"] == 8
    assert [len(v) for v in outcome.details["losses"].values()] == [4, 4]
    assert outcome.details["losses"]["forget"][-1] < outcome.details["losses"]["forget"][0]
    assert outcome.details["losses"]["retain"][0] > 0  # a forget step went before
    alone = xp.unlearn(problem, PART, CodeEraser(**STEPS, constrain=0.0))
    assert alone.details["steps"] == 4 and list(alone.details["losses"]) == ["forget"]
    assert (
        not CodeEraser(constrain=0.0).needs.retain and not CodeEraser(constrain=0.0).needs.original
    )


@pytest.mark.parametrize("smooth", ["none", "sam(0.001)"])
def test_losses_have_one_entry_a_step(problem, smooth):
    """That of the whole set at the weights of the step, in however many batches it is read."""
    whole, pieces = (
        xp.unlearn(problem, PART, CodeEraser(**STEPS, batch_size=n, smooth=smooth)).details[
            "losses"
        ]
        for n in (8, 1)
    )
    assert [len(v) for v in pieces.values()] == [4, 4]
    for name, values in whole.items():
        assert pieces[name] == pytest.approx(values, rel=1e-2, abs=1e-4)


def test_a_mean_of_weights_is_looked_at_and_is_no_best_look(problem):
    with pytest.raises(SettingError, match=r"swa\(2\) ends with a mean .*use keep=last"):
        CodeEraser(smooth="swa(2)")
    found = xp.unlearn(problem, PART, CodeEraser(**STEPS, smooth="swa(2)", keep="last"))
    rows = [s for row in problem.train.rows[:3] if row.marked is not None for s in segments(row)]
    now = accuracies(problem.token_logits, found.runnable(), rows, size=2, device="cpu")
    last = xp.unlearn(problem, PART, CodeEraser(**STEPS, keep="last"))
    assert found.details["accuracy"][-1] == mean(now) != last.details["accuracy"][-1]


def test_the_stop_uses_the_accuracy_of_secrets_at_the_weights_it_keeps(problem):
    ids = PART.resolve(problem.train)
    rows = [s for p in problem.train.positions(ids).tolist() if problem.train.rows[p].marked is not None
            for s in segments(problem.train.rows[p])]  # fmt: skip

    def now(model):
        return mean(accuracies(problem.token_logits, model, rows, size=2, device="cpu"))

    assert now(problem.model) == 1
    settings = {"lr": 1e-2, "epochs": 60, "accuracy": 0.3, "extraction": 0.5}
    for train in ("full", "lora(4)"):
        found = xp.unlearn(problem, PART, CodeEraser(**settings, train=train))
        accuracy = found.details["accuracy"]
        assert "below their thresholds" in found.details["stopped"]
        assert accuracy[0] == 1 and accuracy[-1] < 0.3 <= min(accuracy[:-1])
        assert now(found.runnable()) == accuracy[-1]
        assert found.details["steps"] == 2 * (len(accuracy) - 1)
        likelihood = found.details["extraction"]
        assert all((e is None) == (a > 0.6) for a, e in zip(accuracy, likelihood, strict=True))
    budget = Runtime(budget=Budget(steps=3))
    found = xp.unlearn(problem, PART, CodeEraser(**settings), runtime=budget)
    assert "budget" in found.details["stopped"] and len(found.details["accuracy"]) == 3


def test_the_best_look_is_kept(problem, monkeypatch):
    from expunge.train.until import Watch

    figures = iter([(0.9, math.inf), (0.4, 0.3), (0.4, 0.2), (0.5, 0.0), (math.nan, math.inf)])
    weights = []

    def measure(self):
        weights.append([p.detach().clone() for p in self.model.parameters()])
        return next(figures)

    monkeypatch.setattr(Watch, "measure", measure)
    outcome = xp.unlearn(problem, PART, CodeEraser(**STEPS))
    assert outcome.details["kept_after"] == 2 and len(weights) == 5
    for kept, wanted in zip(outcome.runnable().parameters(), weights[2], strict=True):
        assert torch.equal(kept, wanted)


def test_when_it_stops():
    goal = Goal(accuracy=0.5, extraction=0.1, patience=3, margin=0.3)
    far, inf = (0.9, math.inf), math.inf
    assert goal.reached([far]) is None
    assert goal.reached([far, (0.4, 0.2)]) is None
    assert "0.05 are below" in goal.reached([far, (0.4, 0.05)])
    assert goal.reached([far, (0.5, 0.05)]) is None  # not below
    assert goal.reached([(math.nan, inf)]) is None
    flat = [far, (0.7, 0.3), (0.4, 0.3), (0.4, 0.4)]
    assert goal.reached(flat) is None
    assert "falls no more" in goal.reached([*flat, (0.4, 0.3)])
    assert goal.reached([*flat, (0.4, 0.2)]) is None  # it fell again
    assert goal.reached([*flat, (0.6, 0.3)]) is None


def test_it_resumes_as_an_unbroken_run_and_keeps_the_best(problem, tmp_path):
    settings = CodeEraser(**STEPS | {"epochs": 6})
    whole = xp.unlearn(problem, PART, settings)
    for steps in (3, 8):  # in the middle of a pass, and between two
        runtime = Runtime(checkpoint=tmp_path, checkpoint_every=1, budget=Budget(steps=steps))
        xp.unlearn(problem, PART, settings, runtime=runtime)
    again = xp.unlearn(
        problem, PART, settings, runtime=Runtime(checkpoint=tmp_path, checkpoint_every=1)
    )
    assert again.record["weights"] == whole.record["weights"]
    for key in ("accuracy", "extraction", "kept_after"):
        assert again.details[key] == whole.details[key]


def test_context_and_retain_texts_survive_where_ascent_wrecks_them(problem):
    """Selection keeps what stands around the secrets, the divergence what is elsewhere."""

    def around(outcome):
        rows = [
            dataclasses.replace(r, answered=r.answered & ~r.marked) for r in problem.train.rows[:2]
        ]
        data = TokenData(rows)
        return float(problem.each_loss(outcome.runnable(), data.fetch(data.ids)).detach().mean())

    settings = {"lr": 3e-3, "epochs": 12, "accuracy": 0.0, "keep": "last", "rehearse": 2}
    ascent = xp.unlearn(
        problem, PART, CodeEraser(**settings, spans="all", gamma=0.0, constrain=0.0)
    )
    ours = xp.unlearn(problem, PART, CodeEraser(**settings, gamma=1.0))
    assert around(ours) < around(ascent) - 1


def test_what_is_missing_is_said(build, monkeypatch):
    rows = [Tokens(r.ids, r.answered) for r in marked_rows()]
    plain = CausalLM(build(0), TokenData(rows))
    with pytest.raises(
        DataError, match="none is marked in what is to be forgotten; give records a `secret`"
    ):
        xp.unlearn(plain, PART, CodeEraser())
    monkeypatch.setattr(Runtime, "processes", 2)
    method, runtime = CodeEraser(spans="all"), Runtime(shard=True)
    view = View(plain, PART, method.needs, runtime)
    with pytest.raises(NeedsError, match="a sharded one does not allow"):
        method.run(view, runtime)


def test_defaults_are_the_papers():
    method = CodeEraser()
    assert (method.gamma, method.constrain, method.alpha, method.lr) == (0.1, 0.1, 1.0, 3e-6)
    assert method.step == "adam" and method.margin == 0.3 and method.epochs == 100
    assert method.pace(200)(0) == method.pace(200)(199) == 1.0
    assert (method.clip, method.retain_kl) == (1.0, "sequence")


def test_where_nothing_falls_the_result_is_still_a_trained_model(problem):
    outcome = xp.unlearn(problem, PART, CodeEraser(**STEPS | {"lr": 1e-7}))
    assert set(outcome.details["accuracy"]) == {1.0} and outcome.details["kept_after"] == 1
