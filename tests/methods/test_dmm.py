"""Oracle matching, datamodel matching, DM-Direct: invariants 1, 2, 4 and 7 of the card dmm.

Invariant 3 is in tests/curvature/test_solve.py, 5 and 6 are in tests/audits/test_klom.py.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.data import Data
from expunge.core.errors import (
    AccessError,
    DataError,
    ExpungeError,
    Interrupted,
    ModelError,
    NeedsError,
    UnchangedError,
    UserError,
)
from expunge.core.hashing import hash_model
from expunge.core.method import Prepared, prepared_key, unlearn
from expunge.core.outcome import Wrapper, load
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime, Silent
from expunge.core.view import View
from expunge.curvature.solve import SOLVERS, Lasso, Ridge, explained
from expunge.fleet.datamodels import rows_of
from expunge.fleet.subsets import train_on_subsets
from expunge.methods.general.datamodel_matching import DatamodelMatching
from expunge.methods.general.dm_direct import DMDirect, content_keys
from expunge.methods.general.oracle_matching import OracleMatching
from expunge.problems.classification import Classification
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.nets import SmallResNet

SOME = Request(ids=tuple(range(5, 105, 10)))
"""Ten samples of the small problem."""


def net():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def small() -> Classification:
    """150 digits, 40 more for validation, a small perceptron; ids are not positions."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    train = Data((x[order], y[order]), ids=order)
    recipe = ClassifierRecipe(net, train, epochs=30, lr=0.01, batch_size=256, step="adamw")
    valid, test = ((x[a:b], y[a:b]) for a, b in ((150, 190), (190, 260)))
    return Classification(recipe(train.ids, 0), train, test, valid=valid, recipe=recipe)


@pytest.fixture(scope="module")
def effects(small) -> dict[str, torch.Tensor]:
    return dict(xp.prepare(small, DatamodelMatching(models=40)).tensors)


def given(problem, method, tensors) -> Prepared:
    """Effects as if `prepare` had returned them."""
    return Prepared(tensors, prepared_key(problem, method, Runtime()))


def run(problem, method, tensors=None, request=SOME, **runtime):
    where = Runtime(threads=1, **runtime)
    ready = None if tensors is None else given(problem, method, tensors)
    return unlearn(problem, request, method, runtime=where, prepared=ready)


def zeros(effects):
    return effects | {"effects": torch.zeros_like(effects["effects"])}


def logits(problem, model, ids=None, data=None):
    data = data or problem.train
    batch = data.fetch(data.ids if ids is None else ids)
    with torch.no_grad():
        return problem.logits(model.eval(), batch)


def predicted(problem, method, effects, ids):
    """f̂ by the formula, one sample after the other."""
    result = logits(problem, problem.model, ids).clone()
    order = effects["train_ids"].tolist()
    for row, wanted in enumerate(ids.tolist()):
        for i in SOME.resolve(problem.train).tolist():
            beta = effects["effects"][order.index(i), order.index(wanted)].float()
            result[row] -= method.multiplier * beta
    return result


# ------------------------------------------------------------------ invariant 1


@pytest.mark.parametrize("kind", ["no effect", "not applied"])
def test_dmm_invariant_1_nothing_to_change_changes_nothing(small, effects, kind):
    tensors = zeros(effects) if kind == "no effect" else effects
    method = DatamodelMatching(
        models=40, multiplier=1.0 if kind == "no effect" else 0.0, norm="frozen"
    )
    view = View(small, SOME, method.needs, Runtime())
    outcome = method.run(view, Runtime(), tensors)
    assert [p["loss"] for p in outcome.curve] == [0.0]
    assert hash_model(outcome.model) == small.model_hash()
    with pytest.raises(UnchangedError):
        run(small, method, tensors)


def test_dmm_invariant_1_norm_layers(digits):
    """Without effects weights stay; running statistics stay in eval mode and move in train mode."""
    batch = digits.train.fetch(digits.train.ids[:60])
    torch.manual_seed(0)
    problem = Classification(
        SmallResNet(width=4), (batch.x.reshape(-1, 1, 8, 8), batch.y),
        recipe=lambda keep, seed: SmallResNet(width=4),
    )  # fmt: skip
    tensors = {"effects": torch.zeros(60, 60, 10).half(), "train_ids": torch.arange(60)}
    request = Request(ids=(1, 2, 3))
    for norm, same in (("frozen", True), ("train", False)):
        method = DatamodelMatching(norm=norm, lr=1e-9)
        outcome = method.run(View(problem, request, method.needs, Runtime()), Runtime(), tensors)
        before, after = dict(problem.model.named_buffers()), dict(outcome.model.named_buffers())
        assert all(torch.equal(before[n], after[n]) for n in before) == same


# ------------------------------------------------------------------ invariant 2


def test_dmm_invariant_2_changes_of_disjoint_sets_add_up(effects):
    method = DatamodelMatching(multiplier=1.5)
    ids = effects["train_ids"]
    one, two = ids[3:20], ids[40:110]
    whole = method.change(effects, torch.cat([two, one]))
    parts = method.change(effects, one) + method.change(effects, two)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    assert whole.shape == (150, 10)


def test_half_precision_effects_are_added_in_single_precision():
    """Ten thousand times 0.1 stays at 256 if it is added up in half precision."""
    tenth = torch.full((10_000, 1, 1), 0.1).half()
    prepared = {"effects": tenth, "train_ids": torch.arange(10_000)}
    total = DatamodelMatching().change(prepared, prepared["train_ids"])
    assert float(total) == pytest.approx(float(tenth.double().sum()), rel=1e-5)


# ------------------------------------------------------------------ invariant 4


def ridge_problem():
    """A linear model of two outputs, trained in closed form with an L2 penalty."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=g)
    targets = x @ torch.randn(3, 2, generator=g) + 0.3 * torch.randn(24, 2, generator=g)

    def recipe(keep, seed):
        model = nn.Linear(3, 2, bias=False)
        gram = x[keep].T @ x[keep] + 0.5 * torch.eye(3)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.solve(gram, x[keep].T @ targets[keep]).T)
        return model.eval()

    problem = Problem.of(
        recipe(torch.arange(24), 0), (x, torch.zeros(24)), recipe=recipe,
        each_loss=lambda m, b: (m(b.x) - targets[b.ids]).square().sum(1),
        logits=lambda m, b: m(b.x),
    )  # fmt: skip
    return problem, x, targets


def leave_out_effects(problem, x, targets, forget):
    """Effects whose sum over `forget` is the exact change of every output (Woodbury)."""
    inverse = torch.linalg.inv(x.T @ x + 0.5 * torch.eye(3))
    residual = (targets - problem.model(x)).detach()[forget]
    hat = x[forget] @ inverse @ x[forget].T
    corrected = torch.linalg.solve(torch.eye(len(forget)) - hat, residual)
    effects = torch.zeros(24, 24, 2)
    effects[forget] = (x @ inverse @ x[forget].T).T[:, :, None] * corrected[:, None, :]
    return {"effects": effects, "train_ids": torch.arange(24)}


def test_dmm_invariant_4_exact_influence_is_retraining():
    problem, x, targets = ridge_problem()
    forget = torch.tensor([2, 3, 11, 17])
    request = Request(ids=tuple(forget.tolist()))
    tensors = leave_out_effects(problem, x, targets, forget)
    retrained = problem.recipe(problem.train.without(forget), 0)

    direct = run(problem, DMDirect(), tensors, request).model
    with torch.no_grad():
        torch.testing.assert_close(direct(x), retrained(x), atol=1e-5, rtol=1e-5)
        assert float((problem.model(x) - retrained(x)).abs().max()) > 0.01

    settings = {"epochs": 300, "lr": 0.02, "decay": 0.97, "retain_multiplier": 5.0}
    matched = run(problem, DatamodelMatching(**settings), tensors, request).model
    oracle = run(problem, OracleMatching(oracles=1, **settings), None, request).model
    for model in (matched, oracle):
        torch.testing.assert_close(model.weight, retrained.weight, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------ invariant 7


def test_dmm_invariant_7_direct_says_what_matching_aims_at(small, effects, monkeypatch):
    direct = run(small, DMDirect(models=40, multiplier=2.0), effects)
    method = DatamodelMatching(models=40, multiplier=2.0)
    seen = {}
    true = DatamodelMatching.distance

    def spy(self, out, wanted):
        seen["wanted"] = wanted[0]
        return true(self, out, wanted)

    monkeypatch.setattr(DatamodelMatching, "distance", spy)
    run(small, method, effects)
    ids = method.matching_ids(View(small, SOME, method.needs, Runtime()), Runtime())
    assert torch.equal(logits(small, direct.model, ids), seen["wanted"])
    wanted = predicted(small, method, effects, ids)
    torch.testing.assert_close(seen["wanted"], wanted, rtol=1e-4, atol=1e-4)


def test_dmm_invariant_7_matching_closes_the_gap(small, effects):
    def gap(model, ids, wanted):
        return float((logits(small, model, ids) - wanted).square().mean())

    method = DatamodelMatching(models=40, multiplier=5.0)
    ids = method.matching_ids(View(small, SOME, method.needs, Runtime()), Runtime())
    direct = run(small, DMDirect(models=40, multiplier=5.0), effects).model
    wanted = logits(small, direct, ids)
    gaps = [gap(small.model, ids, wanted)]
    for epochs in (2, 4, 8, 16):
        settings = {"models": 40, "multiplier": 5.0, "lr": 1e-3, "epochs": epochs}
        gaps.append(gap(run(small, DatamodelMatching(**settings), effects).model, ids, wanted))
    assert all(later < earlier for earlier, later in itertools.pairwise(gaps))
    assert gap(direct, ids, wanted) == 0.0


# ------------------------------------------------------------------ what is prepared


def test_effects_predict_models_on_other_subsets(small, effects):
    """Shape, precision, and the share of held-out variance that the record states."""
    assert effects["effects"].shape == (150, 150, 10)
    assert effects["effects"].dtype == torch.float16
    outcome = run(small, DatamodelMatching(models=40), effects)
    assert outcome.details["explained"] == float(effects["explained"]) > 0
    assert outcome.details["lam"] == float(effects["lam"]) > 0


def test_lambda_is_the_best_on_held_out_trainings(small, effects):
    subsets = train_on_subsets(small, 40, 0.5, Runtime())
    y = subsets.outputs.flatten(1)
    lam = float(effects["lam"])

    def share(lam):
        found = Ridge(lam)(subsets.masks[:32], y[:32])
        return explained(found, subsets.masks[32:], y[32:], y[:32].mean(0))

    assert share(lam) == pytest.approx(float(effects["explained"]), abs=2e-3)
    assert share(lam) >= max(share(lam / 10), share(lam * 10))


@pytest.mark.parametrize("how", ["ridge", "lasso", "difference"])
def test_every_estimate_finds_who_matters(how):
    """A recipe that adds up one number a sample: the effect of each is known."""
    worth = torch.linspace(-1, 1, 8)

    def recipe(keep, seed):
        model = nn.Linear(1, 2)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.copy_(torch.stack([worth[keep].sum(), -worth[keep].sum()]))
        return model

    problem = Classification(
        recipe(torch.arange(8), 0), (torch.zeros(8, 1), torch.arange(8) % 2), recipe=recipe
    )
    method = DatamodelMatching(attribution=how, models=1000, lam=1e-3)
    found = method.prepare(problem, Runtime())["effects"].float()
    for c, sign in ((0, 1.0), (1, -1.0)):
        got = sign * (found[:, 3, c] - found[:, 3, c].mean())  # a shift of all cannot be seen
        assert float(torch.corrcoef(torch.stack([got, worth]))[0, 1]) > 0.99
        assert 0.95 < float(got @ worth / (worth @ worth)) < 1.25  # n / (n - 1) for the difference


def test_projected_gradients_are_the_newton_step_of_a_linear_model():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g), torch.arange(12) % 3
    torch.manual_seed(0)
    problem = Classification(nn.Linear(4, 3), (x, y))
    method = DatamodelMatching(attribution="projected", lam=0.1)
    found = method.prepare(problem, Runtime())["effects"]

    with torch.no_grad():
        p = problem.model(x).softmax(1).double()
    own = nn.functional.one_hot(y, 3).double()
    others = p * (1 - own)
    by_logit = own - others / others.sum(1, keepdim=True)  # of the margin
    inputs = torch.cat([x, torch.ones(12, 1)], dim=1).double()
    phi = (by_logit[:, :, None] * inputs[:, None, :]).flatten(1)
    inverse = torch.linalg.inv(phi.T @ phi / 12 + 0.1 * torch.eye(15, dtype=torch.float64))
    right = inverse @ phi.T * (1 - (p * own).sum(1)) / 12
    for c in range(3):
        query = (torch.eye(3, dtype=torch.float64)[c][None, :, None] * inputs[:, None, :]).flatten(
            1
        )
        torch.testing.assert_close(found[:, :, c].double(), (query @ right).T, atol=2e-3, rtol=2e-3)


def test_projected_gradients_need_labels_and_no_recipe(small):
    bare = Classification(small.model, small.train)
    method = DatamodelMatching(attribution="projected", dimension=64, lam=0.01, multiplier=3.0)
    assert method.needs.labels == "all" and not method.needs.recipe
    assert run(bare, method).record["weights"] != bare.model_hash()
    assert DatamodelMatching(attribution="projected", checkpoints=2).needs.recipe
    unlabelled = Data(small.train.fetch(small.train.ids).x, ids=small.train.ids)
    with pytest.raises(NeedsError, match="labels"):
        run(Classification(small.model, unlabelled), method)


def test_checkpoints_are_averaged(small):
    settings = {"attribution": "projected", "dimension": 16, "lam": 0.01}
    one = DatamodelMatching(**settings).prepare(small, Runtime())["effects"].float()
    runtime = Runtime()
    two = DatamodelMatching(checkpoints=2, **settings).prepare(small, runtime)["effects"].float()
    model = small.recipe(small.train.ids, runtime.seed_for("checkpoint", 0))
    other = DatamodelMatching(**settings)._of_model(small, model, 1, runtime)
    torch.testing.assert_close(two, (one + other) / 2, atol=2e-3, rtol=2e-3)


def test_what_is_prepared_depends_on_the_estimate_alone():
    base = DatamodelMatching().preparation_settings()
    assert set(base) == {"attribution", "lam", "models", "share"}
    assert base == DatamodelMatching(epochs=9, multiplier=3.0).preparation_settings()
    assert base != DatamodelMatching(models=7).preparation_settings()
    projected = DatamodelMatching(attribution="projected").preparation_settings()
    assert set(projected) == {"attribution", "lam", "dimension", "checkpoints"}


def test_effects_that_do_not_fit_are_refused(small, monkeypatch):
    monkeypatch.setattr(
        "expunge.fleet.datamodels.SOLVERS",
        {"ridge": lambda lam: lambda a, y: Ridge(1.0)(a, 1e9 * y)},
    )
    with pytest.raises(ExpungeError, match="half precision"):
        DatamodelMatching(models=4).prepare(small, Runtime())


def test_rows_are_found_by_id(effects):
    ids = effects["train_ids"][[5, 3, 140]]
    assert rows_of(effects, ids).tolist() == [5, 3, 140]


# ------------------------------------------------------------------ the loop


def test_matching_reads_no_label(small, effects):
    """Other labels, same result; and the view has none to give."""
    batch = small.train.fetch(small.train.ids)
    other = copy.copy(small)
    other._hashes = {}
    other.train = Data((batch.x, (batch.y + 3) % 10), ids=small.train.ids)
    method = DatamodelMatching(models=40)
    assert method.needs.labels == OracleMatching().needs.labels == "none"
    one, two = (
        method.run(View(p, SOME, method.needs, Runtime()), Runtime(), effects)
        for p in (small, other)
    )
    assert hash_model(one.model) == hash_model(two.model)
    view = View(small, SOME, method.needs, Runtime())
    assert view.everything.fetch(SOME.resolve(small.train)).y is None
    with pytest.raises(AccessError):
        view.forget.labels()


def test_fine_tuning_set(small):
    method = DatamodelMatching(forget_multiplier=2.5, retain_multiplier=3.0)
    view = View(small, SOME, method.needs, Runtime())
    ids = method.matching_ids(view, Runtime())
    forget = SOME.resolve(small.train).tolist()
    assert ids[:25].tolist() == forget + forget + forget[:5]
    drawn = ids[25:].tolist()
    assert len(drawn) == len(set(drawn)) == 30 and not set(drawn) & set(forget)
    assert torch.equal(ids, method.matching_ids(view, Runtime()))
    assert not torch.equal(ids, method.matching_ids(view, Runtime(seed=1)))
    most = DatamodelMatching(retain_multiplier=1e3).matching_ids(view, Runtime())
    assert len(most) == 150
    assert len(DatamodelMatching(retain_multiplier=0.0).matching_ids(view, Runtime())) == 10


def test_losses():
    out = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    wanted = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    squares = OracleMatching().distance(out, wanted)
    torch.testing.assert_close(squares, (out - wanted.mean(0)).square().mean(1))
    soft = wanted.softmax(2).mean(0)
    cross = OracleMatching(loss="ce").distance(out, wanted)
    torch.testing.assert_close(cross, nn.functional.cross_entropy(out, soft, reduction="none"))


def test_learning_rate_falls_by_the_epoch_and_order_is_fixed(small, effects, monkeypatch):
    orders = []
    true = DatamodelMatching.distance
    monkeypatch.setattr(
        DatamodelMatching, "distance",
        lambda self, out, wanted: orders.append(wanted[0, :, 0].tolist()) or true(self, out, wanted),
    )  # fmt: skip
    settings = {"models": 40, "epochs": 12, "lr": 1e-3}
    outcome = run(small, DatamodelMatching(**settings), effects)
    assert outcome.curve[1]["lr"] == pytest.approx(1e-3 * 0.95**10)
    assert all(order == orders[0] for order in orders)
    orders.clear()
    run(small, DatamodelMatching(shuffle=True, **settings), effects)
    assert orders[0] != orders[1] and sorted(orders[0]) == pytest.approx(sorted(orders[1]))


def test_the_anchor_holds(small, effects):
    def moved(**more):
        method = DatamodelMatching(models=40, multiplier=5.0, epochs=20, lr=1e-3, **more)
        model = run(small, method, effects).model
        pairs = zip(model.parameters(), small.model.parameters(), strict=True)
        return float(sum((p - q).detach().square().sum() for p, q in pairs))

    assert moved(anchor=100.0) < 0.5 * moved()


def test_broken_targets_are_an_error(small, effects):
    broken = effects | {"effects": effects["effects"] * torch.nan}
    with pytest.raises(ExpungeError, match="NaN or infinite"):
        run(small, DatamodelMatching(models=40), broken)


# ------------------------------------------------------------------ oracles


def test_oracles_match_retraining(small):
    """On the forget data the gap to an oracle that was not matched shrinks."""
    keep = small.train.without(SOME.resolve(small.train))
    ids = SOME.resolve(small.train)
    fresh = torch.stack([logits(small, small.recipe(keep, s), ids) for s in range(900, 905)]).mean(
        0
    )
    method = OracleMatching(oracles=5, epochs=60, lr=2e-3, decay=1.0)
    after = run(small, method).model
    before = float((logits(small, small.model, ids) - fresh).square().mean())
    assert float((logits(small, after, ids) - fresh).square().mean()) < 0.7 * before


def test_oracles_follow_the_seed_of_the_run(small, monkeypatch):
    seeds = []
    true = View.retrain
    monkeypatch.setattr(View, "retrain", lambda self, s: seeds.append(s) or true(self, s))
    for seed in (0, 0, 1):
        run(small, OracleMatching(oracles=2, epochs=1), seed=seed)
    assert seeds[:2] == seeds[2:4] and not set(seeds[:2]) & set(seeds[4:])
    assert len(set(seeds[:2])) == 2


class StopIn(Silent):
    def __init__(self, task):
        self.task = task

    def advance(self, task, steps=1):
        if task == self.task and steps:
            raise Interrupted("stopped on purpose")


def test_oracle_matching_resumes_in_the_middle_of_matching(small, tmp_path):
    method = OracleMatching(oracles=1, epochs=6, batch_size=8)
    whole = run(small, method)
    options = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interrupted):
        run(small, method, reporter=StopIn("oracle-matching"), **options)
    assert (tmp_path / "oracle-matching.pt").exists()
    assert run(small, method, **options).record["weights"] == whole.record["weights"]


# ------------------------------------------------------------------ DM-Direct


def test_dm_direct_knows_inputs_by_their_content(small, effects):
    """Any order, any batch; what it does not know gets the original's answer or an error."""
    direct = run(small, DMDirect(models=40, multiplier=5.0), effects).model
    ids = small.train.ids[[70, 2, 31]]
    one = logits(small, direct, ids)
    for row, single in zip(one, ids, strict=True):
        torch.testing.assert_close(row, logits(small, direct, single[None])[0])
    assert not torch.allclose(one, logits(small, small.model, ids))
    for data in (small.test, small.valid):
        assert torch.equal(logits(small, direct, data=data), logits(small, small.model, data=data))
    strict = run(small, DMDirect(models=40, refuse=True), effects).model
    logits(small, strict)
    with pytest.raises(DataError, match="prepared for"):
        logits(small, strict, data=small.test)


def test_dm_direct_answers_validation_inputs_if_asked(small):
    method = DMDirect(models=40, validation=True)
    assert method.needs.validation and not DMDirect().needs.validation
    assert method.preparation_settings() != DMDirect(models=40).preparation_settings()
    effects = dict(xp.prepare(small, method).tensors)
    assert effects["effects"].shape == (150, 190, 10)
    direct = run(small, method, effects).model
    change = method.change(effects, SOME.resolve(small.train))
    wanted = logits(small, small.model, data=small.valid) - change[150:]
    torch.testing.assert_close(logits(small, direct, data=small.valid), wanted)


@pytest.mark.parametrize("how", ["ridge", "projected"])
@pytest.mark.parametrize("method", [DatamodelMatching, DMDirect])
def test_validation_data_is_not_read_unless_it_is_declared(small, monkeypatch, method, how):
    assert not method().needs.validation
    monkeypatch.setattr(small.valid, "fetch", lambda ids: pytest.fail("validation data was read"))
    settings = {"models": 4} if how == "ridge" else {"dimension": 8}
    found = method(attribution=how, **settings).prepare(small, Runtime())
    assert found["effects"].shape == (150, 150, 10)


def test_a_descent_that_ends_early_is_in_the_record(small, monkeypatch):
    monkeypatch.setitem(SOLVERS, "lasso", lambda lam: Lasso(lam, steps=1))
    method = DatamodelMatching(attribution="lasso", models=20, lam=1e-9)
    outcome = run(small, method, dict(method.prepare(small, Runtime())))
    assert outcome.details["unfinished"] > 0


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_dm_direct_knows_its_inputs_in_another_precision(small, effects, kind):
    direct = copy.deepcopy(run(small, DMDirect(models=40, multiplier=50.0), effects).model)
    before = copy.deepcopy(small.model)
    x = small.train.fetch(small.train.ids[:20]).x * 1.0
    with torch.no_grad():
        shift = before(x) - direct(x)
        found = before.to(kind)(x.to(kind)) - direct.to(kind)(x.to(kind))
        assert float(shift.abs().max()) > 3
        torch.testing.assert_close(found.float(), shift, atol=0.2, rtol=0.02)
        unknown = torch.randn(5, *x.shape[1:]).to(kind)
        assert torch.equal(direct(unknown), before(unknown))


def test_dm_direct_knows_what_is_left_of_an_input_in_half_precision(small):
    """Numbers that lose digits, inputs that become equal, and one that is exactly such a rest."""
    x = torch.tensor([[0.1, 0.2], [0.1 + 1e-6, 0.2], [0.3, 0.7], [0.3, 0.7]])
    x[3] = x[2].half().float()
    problem = Classification(
        nn.Linear(2, 3), (x, torch.arange(4) % 3), recipe=lambda k, s: nn.Linear(2, 3)
    )
    effects = torch.zeros(4, 4, 3)
    effects[0] = torch.tensor([1.0, 3.0, 5.0, 7.0])[:, None]
    tensors = {"effects": effects.half(), "train_ids": torch.arange(4)}
    outcome = run(problem, DMDirect(), tensors, Request(ids=(0,)))
    assert outcome.details["known_inputs"] == 4

    def shifts(kind):
        with torch.no_grad():
            mine, original = (copy.deepcopy(m).to(kind) for m in (outcome.model, problem.model))
            return (original(x.to(kind)) - mine(x.to(kind)))[:, 0].float()

    torch.testing.assert_close(shifts(torch.float32), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    torch.testing.assert_close(
        shifts(torch.float16), torch.tensor([2.0, 2.0, 7.0, 7.0]), atol=0.01, rtol=0
    )


def test_dm_direct_is_a_wrapper_that_can_be_saved(small, effects, tmp_path):
    outcome = run(small, DMDirect(models=40), effects)
    assert isinstance(outcome.change, Wrapper)
    assert DMDirect.card.intent == "suppression" and DMDirect.card.guarantee == "inference-time"
    inner = outcome.model.unwrapped
    assert hash_model(inner) == small.model_hash()  # it still knows everything
    found = load(outcome.save(tmp_path), model=small.model)
    assert torch.equal(logits(small, found.model), logits(small, outcome.model))
    assert hash_model(outcome.released()) == outcome.record["weights"]
    with pytest.raises(ModelError, match="no known wrapper"):
        Wrapper({"unheard/of": torch.zeros(1)}).apply(small.model)


def test_dm_direct_around_a_model_with_named_inputs_and_outputs():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(2, 3)

        def forward(self, a, b):
            return Output(self.w(a + b))

    g = torch.Generator().manual_seed(0)
    x = {"b": torch.randn(6, 2, generator=g), "a": torch.randn(6, 2, generator=g)}
    problem = Classification(Named(), (x, torch.arange(6) % 3), recipe=lambda keep, seed: Named())
    tensors = {"effects": torch.ones(6, 6, 3).half(), "train_ids": torch.arange(6)}
    direct = run(problem, DMDirect(), tensors, Request(ids=(1, 4))).model
    assert isinstance(direct(**x), Output)
    torch.testing.assert_close(logits(problem, direct), logits(problem, problem.model) - 2)


def test_hidden_layers_keep_their_names_behind_the_wrapper(small, effects):
    direct = run(small, DMDirect(models=40), effects).model
    batch = small.train.fetch(small.train.ids[:3])
    found, wanted = (small.features(m, batch, ["0"])["0"] for m in (direct, small.model))
    assert torch.equal(found, wanted)


def test_keys_tell_inputs_apart():
    x = torch.zeros(3, 4)
    x[1, 2] = 1e-30
    keys = content_keys(x)
    assert keys[0] == keys[2] != keys[1]
    assert torch.equal(content_keys(x[[1, 0]]), keys[[1, 0]])
    named = content_keys({"a": x, "b": x + 1})
    assert torch.equal(named, content_keys({"b": x + 1, "a": x}))


# ------------------------------------------------------------------ what cannot be


def test_without_a_recipe(small):
    bare = Classification(small.model, small.train)
    for method in (DatamodelMatching(), DMDirect(), OracleMatching()):
        with pytest.raises(NeedsError, match="pass recipe="):
            run(bare, method)


def test_effects_of_another_problem_are_refused(small, effects):
    other = Classification(net(), small.train, valid=small.valid, recipe=small.recipe)
    ready = given(other, DatamodelMatching(models=40), effects)
    with pytest.raises(UserError, match="prepare again"):
        unlearn(small, SOME, DatamodelMatching(models=40), prepared=ready)
