"""Engines against the plain loop: the same models, buffers and costs, whatever trains them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time

import pytest
import torch
from fleet_recipes import (
    BUILDS,
    Unloadable,
    conv_norm,
    failing,
    jobs_of,
    mlp,
    norm_mlp,
    problem_of,
    recipe_of,
    regression,
    regressor,
)
from torch import nn

import expunge as xp
from expunge.core.errors import ExpungeError, NeedsError, SettingError, UserError
from expunge.core.runtime import Runtime
from expunge.fleet import together
from expunge.fleet.executors import OneByOne, Together, chosen, executor, in_order
from expunge.fleet.jobs import Done, random_halves
from expunge.fleet.processes import Processes
from expunge.fleet.together import group_size, train_together
from expunge.train.recipe import Stopped


def states(engine, problem, jobs, runtime=None):
    done = engine.run(problem, jobs, runtime or Runtime())
    return [d.model.state_dict() for d in in_order(done)]


def same(found, wanted, atol=1e-9):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.fixture
def stacked(monkeypatch):
    """Counts the groups that were trained at once."""
    sizes = []
    true = together.train_together

    def count(recipe, keeps, seeds, runtime):
        made = true(recipe, keeps, seeds, runtime)
        sizes.append(len(keeps))
        return made

    monkeypatch.setattr(together, "train_together", count)
    return sizes


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("step", ["sgd", "adam"])
def test_together_equals_the_loop(build, step, stacked):
    """In double precision, with a last batch of one sample: weights, running statistics, counts."""
    recipe = recipe_of(build, step=step, weight_decay=0.01)
    problem, jobs = problem_of(recipe, build), jobs_of(recipe.data)
    alone = states(OneByOne(), problem, jobs)
    same(states(Together(), problem, jobs), alone)
    assert stacked == [len(jobs)]
    counts = [v for n, v in alone[0].items() if n.endswith("num_batches_tracked")]
    # 3 batches of 4 an epoch; the batch of one is normalised as at inference and not counted
    assert all(int(c) == 9 for c in counts)
    assert build is mlp or counts


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_layers_as_vmap_has_them_equal_the_loop(build, stacked, monkeypatch):
    """What a GPU runs: grouped convolutions, and running statistics that `vmap` moves in place."""
    monkeypatch.setattr(together, "stackable", lambda network, device: network)
    recipe = recipe_of(build)
    problem, jobs = problem_of(recipe, build), jobs_of(recipe.data)
    same(states(Together(), problem, jobs), states(OneByOne(), problem, jobs))
    assert stacked == [4]


def test_stacked_layers_round_as_single_ones(digits, stacked):
    """Single precision; without those layers, the last bit grows into the second digit in job 6."""
    jobs = random_halves(digits, 8)[5:]
    same(states(Together(), digits, jobs), states(OneByOne(), digits, jobs), atol=1e-4)
    assert stacked == [3]


def test_running_statistics_are_each_models_own(stacked):
    recipe = recipe_of(norm_mlp)
    problem, jobs = problem_of(recipe, norm_mlp), jobs_of(recipe.data)
    found = states(Together(), problem, jobs)
    means = torch.stack([s["2.running_mean"] for s in found])
    assert float((means - means.mean(0)).abs().min()) > 1e-6
    assert not torch.equal(means[0], torch.zeros(8, dtype=torch.float64))


def test_batch_norm_on_whole_batches_in_one_group(stacked):
    recipe = dataclasses.replace(recipe_of(conv_norm), batch_size=13)
    problem, jobs = problem_of(recipe, conv_norm), jobs_of(recipe.data)
    same(states(Together(), problem, jobs), states(OneByOne(), problem, jobs))
    assert stacked == [4]


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
def test_gradients_are_clipped_for_each_model(clip, stacked):
    recipe = recipe_of(clip=clip)
    problem, jobs = problem_of(recipe), jobs_of(recipe.data)
    found = states(Together(), problem, jobs)
    same(found, states(OneByOne(), problem, jobs))
    free = states(Together(), problem_of(recipe_of()), jobs)
    assert torch.equal(found[0]["1.weight"], free[0]["1.weight"]) == (clip == 1e3)


def test_regressors_go_together(stacked):
    recipe = regression()
    p = xp.Regression(regressor(), recipe.data, recipe.data, recipe=recipe, loss="mse")
    jobs = jobs_of(recipe.data)
    same(states(Together(), p, jobs), states(OneByOne(), p, jobs))
    assert stacked == [4]


def test_a_stopped_recipe_goes_together(stacked):
    recipe = recipe_of()
    problem, jobs = problem_of(Stopped(recipe, 2)), jobs_of(recipe.data)
    alone = states(OneByOne(), problem, jobs)
    same(states(Together(), problem, jobs), alone)
    assert stacked == [4]
    model = recipe.train(jobs[0].keep, jobs[0].seed, last=2)[0]
    assert torch.equal(model.state_dict()["1.weight"], alone[0]["1.weight"])
    assert not torch.allclose(
        alone[0]["1.weight"], recipe(jobs[0].keep, 11).state_dict()["1.weight"]
    )


def test_data_read_batch_by_batch_are_the_same(monkeypatch):
    recipe = recipe_of()
    jobs = jobs_of(recipe.data)
    arguments = (recipe, [j.keep for j in jobs], [j.seed for j in jobs], Runtime())
    held = [m.state_dict() for m in train_together(*arguments)]
    monkeypatch.setattr(together, "HELD", 0)
    same([m.state_dict() for m in train_together(*arguments)], held, atol=0)


def test_groups_are_bounded_by_what_a_backward_pass_keeps():
    small = group_size(recipe_of(conv_norm, batch_size=2), conv_norm(), 2**18)
    large = group_size(recipe_of(conv_norm, batch_size=16), conv_norm(), 2**18)
    assert 1 < large < small / 3
    assert group_size(recipe_of(), mlp(), 1) == 1


def test_batch_norm_on_a_cpu_is_stacked_only_when_asked(stacked):
    recipe = recipe_of(conv_norm)
    problem, jobs = problem_of(recipe, conv_norm), jobs_of(recipe.data)
    same(states(Together(where_quicker=True), problem, jobs), states(OneByOne(), problem, jobs), 0)
    assert stacked == []


def test_a_training_that_diverges_is_an_error_whoever_trains():
    recipe = recipe_of(lr=1e200)
    for engine in (OneByOne(), Together()):
        with pytest.raises(ExpungeError, match="training from the recipe stopped"):
            states(engine, problem_of(recipe), jobs_of(recipe.data))


def test_processes_equal_the_loop_to_the_bit():
    recipe = recipe_of(conv_norm)
    problem, jobs = problem_of(recipe, conv_norm), jobs_of(recipe.data, 5)
    done = list(Processes(2).run(problem, jobs, Runtime()))
    assert sorted(d.index for d in done) == [0, 1, 2, 3, 4]
    assert all(d.cost.seconds > 0 and d.cost.gradients == 3 * 13 for d in done)
    assert not any(d.model.training for d in done)
    found = [d.model.state_dict() for d in sorted(done, key=lambda d: d.index)]
    same(found, states(OneByOne(), problem, jobs), atol=0)


def test_a_failure_in_a_process_is_the_failure_itself_and_ends_the_workers():
    problem = problem_of(failing)
    jobs = jobs_of(problem.train)
    with pytest.raises(RuntimeError, match="seed 13 fails"):
        list(Processes(1).run(problem, jobs, Runtime()))
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_what_cannot_travel_is_said_in_a_sentence():
    data = recipe_of().data
    local = problem_of(recipe_of(lambda: mlp()))
    with pytest.raises(UserError, match=r"cannot be sent to other processes .*top of a module"):
        list(Processes(1).run(local, jobs_of(data), Runtime()))
    with pytest.raises(
        UserError, match=r"cannot load the recipe \(not here\); define it in a module"
    ):
        list(Processes(1).run(problem_of(Unloadable()), jobs_of(data, 1), Runtime()))


def test_no_jobs_need_no_workers():
    problem = problem_of(recipe_of())
    for engine in (OneByOne(), Together(), Processes(2)):
        assert list(engine.run(problem, [], Runtime())) == []


def test_engines_by_name():
    assert isinstance(executor("one-by-one"), OneByOne)
    assert isinstance(executor("together"), Together)
    pool = executor("processes:3")
    assert isinstance(pool, Processes) and pool.workers == 3
    assert executor("processes").workers >= 1  # type: ignore[attr-defined]
    for wrong in ("", "loop", "processes:", "processes:0", "processes:-1", "together:2"):
        with pytest.raises(SettingError):
            executor(wrong)


def test_an_argument_goes_before_the_runtime():
    runtime = Runtime(engine="together")
    assert isinstance(chosen(None, runtime), Together)
    assert isinstance(chosen("one-by-one", runtime), OneByOne)
    mine = Together()
    assert chosen(mine, Runtime()) is mine
    assert isinstance(chosen(None, Runtime()), OneByOne)
    assert chosen(None, Runtime(), mine) is mine


def test_without_a_recipe_there_is_no_fleet():
    bare = xp.Classification(mlp(), recipe_of().data)
    for engine in (OneByOne(), Together(), Processes(1)):
        with pytest.raises(NeedsError, match="pass recipe="):
            list(engine.run(bare, jobs_of(bare.train), Runtime()))


def test_early_results_wait_for_their_turn():
    model = nn.Linear(1, 1)
    done = [Done(i, model, xp.Cost()) for i in (2, 0, 3, 1)]
    assert [d.index for d in in_order(iter(done))] == [0, 1, 2, 3]
