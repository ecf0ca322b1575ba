"""Prune-first: masks of the card sparse-unlearn, and problems that keep them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import ModelError, NeedsError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.method import prepared_key
from expunge.core.pruned import clear_pruned, keep_only, kept_of
from expunge.core.runtime import Runtime
from expunge.store import Store
from expunge.suite.bench import Bench, unlearn_key
from expunge.suite.reproduce import problem_of, reproduce
from expunge.train.fit import fit
from expunge.train.prune import (
    Pruning,
    all_prunable,
    prune,
    removals,
    synflow,
    without_lowest,
)
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.nets import SmallResNet

REQUEST = xp.forget(label=3)


def density(kept) -> float:
    return sum(int(m.sum()) for m in kept.values()) / sum(m.numel() for m in kept.values())


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 10)
    )


@pytest.fixture(scope="module")
def problem(digits):
    recipe = ClassifierRecipe(perceptron, digits.train, epochs=4, lr=0.1, batch_size=64)
    return xp.Classification(
        recipe(digits.train.ids, 0), digits.train, digits.test, recipe=recipe, name="small"
    )


@pytest.fixture(scope="module")
def pruned(problem):
    return prune(problem, "omp:0.7")


# ------------------------------------------------------------------ invariant 2: OMP and IMP


def test_sparse_unlearn_invariant_2_omp_removes_the_smallest_of_all_together(problem, pruned):
    total = 64 * 20 + 20 * 15 + 15 * 10
    gone = sum(int((~m).sum()) for m in pruned.kept.values())
    assert gone == round(0.7 * total)
    dense = problem.model  # seed 0 trained the original too
    survivors = torch.cat([
        dense.get_parameter(n).detach()[m].abs() for n, m in pruned.kept.items()
    ])
    removed = torch.cat([dense.get_parameter(n).detach()[~m].abs() for n, m in pruned.kept.items()])
    assert float(survivors.min()) >= float(removed.max())
    shares = {n: float(m.float().mean()) for n, m in pruned.kept.items()}
    assert len(set(shares.values())) > 1  # a threshold over all tensors, not one each


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_sparse_unlearn_invariant_2_imp_rounds_multiply_the_density(problem, rounds):
    total = sum(m.numel() for m in all_prunable(problem.model, True).values())
    pruning = Pruning(how="imp", rate=1 - 0.8**rounds)
    assert removals(pruning, total) == [round(total * (1 - 0.8**k)) for k in range(1, rounds + 1)]
    if rounds == 2:
        sparse = prune(problem, pruning)
        assert density(sparse.kept) == pytest.approx(0.8**2, abs=1 / total)


def test_sparse_unlearn_imp_ends_at_its_rate_and_nests():
    assert len(removals(Pruning(how="imp", rate=0.95), 10_000)) == 14
    assert removals(Pruning(how="imp", rate=0.95), 10_000)[-1] == 9500
    scores = {"a": torch.rand(40), "b": torch.rand(60)}
    first = without_lowest(scores, {n: torch.ones_like(s).bool() for n, s in scores.items()}, 30)
    second = without_lowest({n: 1 - s for n, s in scores.items()}, first, 50)
    assert all(not bool((second[n] & ~first[n]).any()) for n in scores)
    assert sum(int((~m).sum()) for m in second.values()) == 50


def test_sparse_unlearn_omp_rewinds_weights_schedule_and_order(problem):
    """By hand: the weights after epoch 2 under the mask, then epochs 3 and 4 of the same training."""
    pruning = Pruning(how="omp", rate=0.7, rewind=2)
    sparse = prune(problem, pruning)
    recipe, ids = problem.recipe, problem.train.ids
    _, (early,) = recipe.train(ids, 0, snapshots=(2,))
    wanted, _ = recipe.train(ids, 0, kept=sparse.kept, start=early, first=2)
    assert hash_model(wanted) == hash_model(sparse.model)
    shorter = ClassifierRecipe(perceptron, problem.train, epochs=2, lr=0.1, batch_size=64)
    assert hash_model(shorter(ids, 0)) != hash_model(problem.model)
    with pytest.raises(SettingError, match="rewind"):
        prune(problem, Pruning(rewind=4))


def test_edges_can_be_left_whole(problem):
    sparse = prune(problem, Pruning(rate=0.5, edges=False))
    assert list(sparse.kept) == ["2.weight"]


# ------------------------------------------------------------------ invariant 5: SynFlow


def test_sparse_unlearn_invariant_5_synflow_reads_no_data_and_restores_signs(problem):
    untrained = problem.recipe.initial(0)
    before = hash_model(untrained)
    mask = synflow(untrained, problem, Pruning(how="synflow", rate=0.9))
    assert hash_model(untrained) == before
    x = torch.randn(30, 64) * 100
    other = xp.Classification(untrained, (x, torch.arange(30) % 10))
    again = synflow(untrained, other, Pruning(how="synflow", rate=0.9))
    assert all(torch.equal(mask[n], again[n]) for n in mask)
    assert density(mask) == pytest.approx(0.1, abs=1e-3)
    assert all(bool(m.any()) for m in mask.values())  # no layer collapses


def test_sparse_unlearn_invariant_5_synflow_scores_are_conserved():
    """On a network without biases the scores of each layer add up to the same flow."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    work = copy.deepcopy(model).double()
    with torch.no_grad():
        for p in work.parameters():
            p.abs_()
    parameters = [*work.parameters()]
    flow = work(torch.ones(1, 5).double()).sum()
    found = torch.autograd.grad(flow, parameters)
    scores = [(g * p).detach().flatten() for g, p in zip(found, parameters, strict=True)]
    assert [float(s.sum()) for s in scores] == pytest.approx([float(flow.detach())] * 2)
    problem = xp.Classification(model, (torch.randn(6, 5), torch.arange(6) % 3))
    mask = synflow(model, problem, Pruning(how="synflow", rate=0.25), rounds=1)
    joined = torch.cat(scores)
    flat = torch.cat([m.flatten() for m in mask.values()])
    assert float(joined[flat].min()) >= float(joined[~flat].max())


def test_synflow_trains_from_the_initialisation_it_scored(digits):
    recipe = ClassifierRecipe(perceptron, digits.train, epochs=1, lr=1e-30, weight_decay=0.0)
    p = xp.Classification(recipe(digits.train.ids, 0), digits.train, recipe=recipe)
    sparse = prune(p, "synflow:0.5")
    start = recipe.initial(0)
    for name, mask in sparse.kept.items():
        torch.testing.assert_close(sparse.model.get_parameter(name)[mask], start.get_parameter(name)[mask])  # fmt: skip


def test_synflow_on_convolutions_with_batch_norm():
    model = SmallResNet(width=4)
    problem = xp.Classification(model, (torch.randn(12, 1, 8, 8), torch.arange(12) % 10))
    mask = synflow(model, problem, Pruning(how="synflow", rate=0.8), rounds=10)
    assert density(mask) == pytest.approx(0.2, abs=1e-3)


# ------------------------------------------------------------------ problems that keep the mask


def is_sparse(model, kept) -> bool:
    return all(not bool(model.get_parameter(n)[~m].any()) for n, m in kept.items())


def test_everything_made_from_a_pruned_problem_has_its_zeros(pruned):
    from expunge.core.view import View

    retrained = pruned.recipe(pruned.train.ids[:200], 7)
    needs = xp.Needs(fresh=True, retain=True)
    view = View(pruned, REQUEST, needs, Runtime())
    pruned_build = pruned.fresh(1)
    for model in (pruned.model, retrained, view.model(), pruned_build, view.fresh("x")):
        assert is_sparse(model, pruned.kept)
        assert kept_of(model) is not None
    same_seed = pruned.recipe(pruned.train.ids[:200], 7)
    assert hash_model(same_seed) == hash_model(retrained)
    assert hash_model(pruned.recipe.recipe(pruned.train.ids[:200], 7)) != hash_model(retrained)


def test_a_training_intersects_its_own_mask_with_the_pruning(pruned):
    outcome = xp.unlearn(pruned, REQUEST, xp.methods.FineTune(epochs=1, lr=0.1, train="last(1)"))
    assert is_sparse(outcome.model, pruned.kept)
    for name, p in outcome.model.named_parameters():
        before = pruned.model.get_parameter(name)
        assert torch.equal(p, before) == (not name.startswith("4."))


def test_a_method_that_ignores_the_mask_is_put_right(pruned):
    """Even one that states its own change from dense weights."""

    class Careless(xp.Method):
        name = "careless"
        card = xp.methods.SSD.card
        needs = xp.Needs(forget=True)

        def run(self, view, runtime):
            model = view.model()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)
            from expunge.core.outcome import Weights

            return xp.Outcome(model, Weights.between(pruned.model, model))

    outcome = xp.unlearn(pruned, REQUEST, Careless())
    assert is_sparse(outcome.model, pruned.kept) and is_sparse(outcome.released(), pruned.kept)


def test_keys_differ_with_the_mask(problem, pruned):
    """Same weights, another mask: nothing stored for one serves the other."""
    mask = {n: m.clone() for n, m in pruned.kept.items()}
    name = next(iter(mask))
    zero = (~mask[name]).nonzero()[0]
    mask[name][tuple(zero)] = True
    other = problem.pruned(pruned.model, mask, recipe=pruned.recipe, name="other", source={})
    assert other.model_hash() == pruned.model_hash()
    assert other.fingerprint() != pruned.fingerprint()
    method, runtime = xp.methods.SSD(), Runtime()
    assert unlearn_key(other, REQUEST, method, runtime) != unlearn_key(pruned, REQUEST, method, runtime)  # fmt: skip
    assert prepared_key(other, method, runtime) != prepared_key(pruned, method, runtime)
    assert problem.fingerprint()["mask"] is None
    assert problem.recipe_key() != pruned.recipe_key()


def test_the_dense_problem_stays_dense(problem):
    before = hash_model(problem.model)
    prune(problem, "omp:0.5")
    assert hash_model(problem.model) == before and problem.kept is None


def test_without_a_recipe_that_can_it_says_so(problem, pruned):
    bare = xp.Classification(problem.model, problem.train)
    with pytest.raises(NeedsError, match="pass recipe="):
        prune(bare, "omp:0.5")
    other = xp.Classification(problem.model, problem.train, recipe=lambda keep, seed: problem.model)
    with pytest.raises(NeedsError, match="ClassifierRecipe"):
        prune(other, "imp:0.5")
    with pytest.raises(NeedsError, match="already"):
        prune(pruned, "omp:0.5")


@pytest.mark.parametrize("text", ["omp", "omp:1", "omp:0", "omp:x", "magnitude:0.5", "synflow:-1"])
def test_a_pruning_that_cannot_be_meant_is_refused(text):
    with pytest.raises(SettingError):
        Pruning.parse(text)


def test_a_mask_of_another_model_is_refused():
    with pytest.raises(ModelError, match="does not fit"):
        keep_only(nn.Linear(2, 2), {"weight": torch.ones(3, 3).bool()})


def test_clearing_puts_exact_zeros_where_nan_was():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), 1.0], [-0.0, 2.0]]))
    assert clear_pruned(model, {"weight": torch.tensor([[False, True], [False, True]])})
    assert model.weight.detach().tolist() == [[0.0, 1.0], [0.0, 2.0]]
    assert not bool(model.weight.signbit().any())


def test_fit_keeps_the_zeros_of_a_resumed_training(pruned, tmp_path):
    """The mask comes from the model, whoever calls `fit`."""
    model = copy.deepcopy(pruned.model)
    batch = pruned.train.fetch(pruned.train.ids[:64])
    loss = lambda m, b: pruned.each_loss(m, b).mean()  # noqa: E731
    fit(model, lambda epoch: [(loss, batch)] * 3, runtime=Runtime(), epochs=2, lr=0.1,
        momentum=0.9, weight_decay=0.1)  # fmt: skip
    assert is_sparse(model, pruned.kept)
    assert any(not torch.equal(p, pruned.model.get_parameter(n)) for n, p in model.named_parameters())  # fmt: skip


# ------------------------------------------------------------------ store and command line


def test_a_pruned_original_is_kept_and_built_again(tmp_path):
    store, jobs = Store.open(tmp_path / "store"), []
    bench = Bench(store, Runtime(threads=1), on_job=lambda *job: jobs.append(job))
    dense = bench.workload("digits-class")
    first, second = bench.pruned(dense, "omp:0.9"), bench.pruned(dense, "omp:0.9")
    assert [job[2] for job in jobs[-2:]] == [False, True]
    assert first.fingerprint() == second.fingerprint() and first.recipe_key() == second.recipe_key()
    assert bench.original(second) == jobs[-1][3]
    outcome, run = bench.unlearn(second, REQUEST, xp.methods.FineTune(epochs=1), 0)
    rebuilt = problem_of(store.get(run).record, Bench(store, Runtime(threads=1)))
    assert rebuilt.kept is not None and rebuilt.fingerprint() == first.fingerprint()
    for id_ in (run, bench.original(second)):
        assert reproduce(store.get(id_), store, Runtime()).identical
    other = bench.pruned(dense, "omp:0.8")
    assert other.fingerprint() != first.fingerprint()
    loaded = xp.load(outcome.save(tmp_path / "saved"))
    assert is_sparse(loaded.runnable(), first.kept)


@pytest.mark.parametrize("how", ["imp:0.36", "synflow:0.9"])
def test_unlearn_command_prunes_first(tmp_path, how):
    from typer.testing import CliRunner

    from expunge.cli.__main__ import app

    line = ["unlearn", "--workload", "digits-class", "--method", "iau", "--prune", how, "--json", "--store", str(tmp_path / "s")]  # fmt: skip
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    record = Store.open(tmp_path / "s").get(shown["run"]).record
    assert record["source"]["kind"] == "pruned" and record["fingerprint"]["mask"]
    assert record["problem"] == f"digits-class ({how})"
