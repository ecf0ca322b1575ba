"""Suite files with pruning and strata, and what `strata=` takes by name."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import NeedsError, SettingError, UserError
from expunge.core.strata import Strata
from expunge.suite.bench import STRATA, STRATA_RUNS, Bench
from expunge.suite.suite import read_suite, run_suite, suite_from

GOOD = {"name": "x", "methods": ["finetune"], "problem": [{"workload": "digits-class"}]}
RUNTIME = xp.Runtime(threads=1)

SUITE = """
name = "sparse and dense, by difficulty"
references = 1
audits = ["accuracy"]
strata = "el2n"
methods = [{ name = "finetune", epochs = 1 }]

[[problem]]
workload = "digits-class"
requests = [{ fraction = 0.2 }, { label = [3] }]

[[problem]]
workload = "digits-class"
prune = "omp:0.5"
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"problem": [{"workload": "digits-class", "prune": "omp"}]}, r"omp\|imp\|synflow:RATE"),
        ({"problem": [{"workload": "digits-class", "prune": "snip:0.5"}]}, "snip"),
        ({"problem": [{"workload": "digits-class", "prune": "imp:1"}]}, "below 1"),
        ({"problem": [{"workload": "digits-class", "prune": 0.5}]}, "problem.0.prune"),
        ({"strata": "hardness"}, r"el2n\|grand\|forgetting"),
        ({"strata": 3}, "strata"),
        ({"strata": "el2n", "problem": [{"workload": "diabetes-range"}]}, "use grand"),
    ],
)
def test_pruning_and_strata_are_checked_before_it_runs(change, says):
    with pytest.raises(UserError, match=says):
        suite_from({**GOOD, **change})


@pytest.mark.parametrize("workload", ["digits-class", "diabetes-range"])
def test_what_is_possible_is_accepted(workload):
    one = {"workload": workload, "prune": "synflow:0.5"}
    spec = suite_from({**GOOD, "strata": "grand", "problem": [one]})
    assert spec.strata == "grand" and spec.problem[0].prune == "synflow:0.5"
    assert suite_from(spec.model_dump()) == spec
    assert suite_from(GOOD).strata is None


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Store, spec, the suite's id and its comparison."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "suite.toml").write_text(SUITE)
    store, spec = xp.Store.open(folder / "store"), read_suite(folder / "suite.toml")
    return store, spec, *run_suite(spec, store, RUNTIME)


def test_a_suite_prunes_and_breaks_down_by_difficulty(ran):
    store, _, suite, found = ran
    samples, three, sparse = found.data["comparisons"]
    assert samples["workload"] == three["workload"] == "digits-class"
    assert sparse["workload"] == "digits-class (omp:0.5)"
    for one in (samples, three, sparse):
        assert "el2n" in one["strata"]["about"] and f"{STRATA_RUNS} trainings" in one["strata"]["about"]  # fmt: skip
        assert sum(one["strata"]["forget"].values()) == one["splits"]["forget-train"]
        for row in one["rows"]:
            for part in ("easy", "medium", "hard"):
                assert f"accuracy/retain-train@{part}" in row["findings"]
    assert three["strata"] == sparse["strata"]  # the parts do not depend on the mask
    original = samples["rows"][0]["findings"]
    assert original["accuracy/forget-train@easy"]["reference"] > original["accuracy/forget-train@hard"]["reference"]  # fmt: skip
    (run,) = [r for r in sparse["rows"] if r["method"] == "finetune"]
    assert store.get(run["run"]).record["fingerprint"]["mask"]
    assert len(store.runs(kind="difficulty")) == 1
    kept = [job for job in store.jobs(suite) if job["key"].startswith("digits-class: el2n")]
    assert [job["status"] for job in kept] == ["done", "reused"]


def test_running_it_again_computes_nothing(ran):
    store, spec, _, found = ran
    before = len(store.runs())
    suite, again = run_suite(spec, store, RUNTIME)
    assert {job["status"] for job in store.jobs(suite)} == {"reused"}
    assert len(store.runs()) == before
    assert [r["findings"] for r in again.rows] == [r["findings"] for r in found.rows]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def small(recipe: str = "whole"):
    torch.manual_seed(1)
    data = xp.Data((torch.randn(60, 6), torch.arange(60) % 3))
    chosen = {
        "none": None,
        "function": lambda keep_ids, seed: net(seed),
        "whole": xp.ClassifierRecipe(net, data, epochs=4, lr=0.1, batch_size=16),
    }[recipe]
    return xp.Classification(net(), data, recipe=chosen)


@pytest.mark.parametrize("score", STRATA)
def test_a_name_is_the_difficulty_of_that_name(score):
    store, jobs = xp.Store.temporary(), []
    bench = Bench(store, xp.Runtime(threads=1, seed=5), lambda *job: jobs.append(job))
    found = bench.strata(small(), score)
    assert [job[2] for job in jobs] == [False]
    wanted = xp.difficulty(small(), score, runs=STRATA_RUNS, store=store)
    assert len(store.runs(kind="difficulty")) == 1  # whatever the seed of the bench
    assert found.key() == wanted.strata().key() and found.about == wanted.strata().about
    assert bench.strata(small(), score).key() == found.key()
    assert [(job[0], job[2]) for job in jobs[1:]] == [(f"Sequential: {score}", True)]
    assert store.get(jobs[1][3]).kind == "difficulty"


def test_a_pruned_problem_has_the_parts_of_the_dense_one():
    store, dense = xp.Store.temporary(), small()
    bench = Bench(store, RUNTIME)
    sparse = bench.pruned(dense, "omp:0.5")
    assert bench.strata(sparse, "grand").key() == bench.strata(dense, "grand").key()
    assert len(store.runs(kind="difficulty")) == 1
    assert sparse.recipe is not dense.recipe  # the problem itself is left as it was


def test_whatever_else_strata_takes_is_left_as_it_is():
    bench = Bench(xp.Store.temporary(), RUNTIME)
    parts = Strata({"a": torch.tensor([1]), "b": torch.tensor([2])})
    assert bench.strata(small("none"), parts) is parts
    assert bench.strata(small("none"), {"a": [1], "b": [2]}).key() == parts.key()
    assert bench.strata(small("none"), None) is None
    with pytest.raises(UserError, match="by name of the stratum"):
        bench.strata(small(), 3)


@pytest.mark.parametrize(
    ("recipe", "score", "error", "says"),
    [
        ("none", "el2n", NeedsError, "has none; pass recipe="),
        ("function", "el2n", NeedsError, "ClassifierRecipe"),
        ("whole", "l1", SettingError, r"strata='l1' is not a choice; use el2n\|grand\|forgetting"),
    ],
)
@pytest.mark.parametrize("through", ["compare", "audit"])
def test_a_score_that_cannot_be_had_is_refused_before_any_work(recipe, score, error, says, through):
    store, problem, request = xp.Store.temporary(), small(recipe), xp.forget(label=1)
    options = {"strata": score, "audits": ["accuracy"], "store": store, "runtime": RUNTIME}
    outcome = xp.unlearn(problem, request, xp.methods.FineTune(epochs=1), runtime=RUNTIME)
    call = {
        "compare": lambda: xp.compare(problem, request, ["finetune"], **options),
        "audit": lambda: xp.audit(outcome, **options),
    }[through]
    with pytest.raises(error, match=says) as caught:
        call()
    assert str(caught.value).count(". ") == 0
    assert store.runs() == []


def test_compare_and_audit_take_a_name():
    store, problem, request = xp.Store.temporary(), small(), xp.forget(fraction=0.5)
    options = {"strata": "el2n", "audits": ["accuracy"], "references": 1, "store": store, "runtime": RUNTIME}  # fmt: skip
    found = xp.compare(problem, request, [], **options)
    assert "accuracy/forget-train@hard" in found.rows[0]["findings"]
    json.dumps(found.data, allow_nan=False)
    outcome = xp.unlearn(problem, request, xp.methods.FineTune(epochs=1), runtime=RUNTIME)
    names = {f.name for f in xp.audit(outcome, **options)}
    assert {f"accuracy/retain-train@{p}" for p in ("easy", "medium", "hard")} <= names
    assert len(store.runs(kind="difficulty")) == 1


@pytest.mark.parametrize("page", ["difficulty-and-tuning.md", "pruning.md"])
def test_suite_files_of_the_documentation_can_be_run(page):
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    specs = [suite_from(tomllib.loads(block)) for block in blocks]
    assert any(spec.strata or spec.problem[-1].prune for spec in specs)


def test_a_regressor_has_grand_alone():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    data = xp.Data((x, x.sum(1)))
    build = lambda: nn.Linear(6, 1)  # noqa: E731
    recipe = xp.RegressorRecipe(build, data, epochs=4, lr=0.01, batch_size=16)
    problem = xp.Regression(build(), data, recipe=recipe)
    bench = Bench(xp.Store.temporary(), RUNTIME)
    assert sum(len(ids) for ids in bench.strata(problem, "grand").parts.values()) == 40
    with pytest.raises(NeedsError, match="logits"):
        bench.strata(problem, "el2n")
