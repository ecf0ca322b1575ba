"""Suggestions: who can run, what is missing, and what the store has seen."""

from __future__ import annotations

import json

import pytest
import torch

import expunge as xp
from expunge.core.errors import NeedsError
from expunge.core.hashing import hash_model
from expunge.methods import registry
from expunge.suite.bench import Bench
from expunge.suite.compare import compare
from expunge.workloads.nets import digits_mlp

SOME = ["finetune", "ssd", "retrain", "unsir", "concept-poison", "blindspot", "bad-teacher"]


def by_name(found):
    return {one.method: one for one in found}


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    data = xp.Data((torch.randn(40, 64, generator=generator), torch.arange(40) % 10))
    return xp.Classification(digits_mlp(), data, name="table")


@pytest.fixture(scope="module")
def store(digits, tmp_path_factory):
    """A store with three audited runs on the digits: two of a class, one of samples."""
    opened = xp.Store.open(tmp_path_factory.mktemp("store"))
    bench = Bench(opened, xp.Runtime(threads=1))
    options = {"references": 1, "audits": ["accuracy"], "bench": bench}
    compare(digits, xp.forget(label=7), ["ssd", "finetune"], **options)
    compare(digits, xp.forget(ids=digits.train.ids[:20].tolist()), ["finetune"], **options)
    return opened


def test_every_method_is_there_once(table):
    found = xp.suggest(table, xp.forget(label=3))
    assert sorted(one.method for one in found) == sorted(registry)
    able = [one.runs for one in found]
    assert able == sorted(able, reverse=True)  # who cannot comes last
    assert all((one.missing is None) == one.runs for one in found)


def test_what_is_missing_says_how_to_give_it(table):
    found = by_name(xp.suggest(table, xp.forget(label=3), methods=SOME))
    assert found["finetune"].runs
    assert "recipe=" in found["retrain"].missing
    assert "build=" in found["bad-teacher"].missing
    assert "regression" in found["blindspot"].missing
    assert "poisoner=none" in found["concept-poison"].missing
    bare = xp.Classification(digits_mlp(), torch.randn(40, 64))
    assert "labels" in by_name(xp.suggest(bare, xp.forget(ids=[1]), methods=SOME))["ssd"].missing


def test_the_request_counts(digits):
    assert by_name(xp.suggest(digits, xp.forget(label=3), methods=SOME))["unsir"].runs
    samples = by_name(
        xp.suggest(digits, xp.forget(ids=digits.train.ids[:3].tolist()), methods=SOME)
    )
    assert "label=" in samples["unsir"].missing


def test_settings_for_the_problem_are_used(digits):
    one = by_name(xp.suggest(digits, xp.forget(label=3), methods=SOME))["concept-poison"]
    assert one.settings["poisoner"] == "none"
    assert one.runs


def test_who_is_said_to_run_runs_and_who_is_not_does_not(table):
    request = xp.forget(label=3)
    for one in xp.suggest(table, request):
        method = registry.get(one.method)()
        if not one.runs:
            with pytest.raises(xp.UserError):
                xp.unlearn(table, request, method)


def _problem(kind, deep, retrains):
    """A tiny network that is one layer or two; with or without a recipe."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.arange(40) % 4
    regression, outputs = kind == "regression", 1 if kind == "regression" else 4

    def build():
        body = [torch.nn.Linear(6, 8), torch.nn.ReLU()] if deep else []
        return torch.nn.Sequential(*body, torch.nn.Linear(8 if deep else 6, outputs))

    torch.manual_seed(0)
    data = xp.Data((x, y.float() if regression else y))
    make, train = (xp.Regression, xp.RegressorRecipe) if regression else (xp.Classification, xp.ClassifierRecipe)  # fmt: skip
    recipe = train(build, data, epochs=1, batch_size=16, lr=0.01) if retrains else None
    return make(build().eval(), data, recipe=recipe)


QUICK = {
    "dm-direct": {"models": 4}, "datamodel-matching": {"models": 4}, "oracle-matching": {"oracles": 2},
}  # fmt: skip


@pytest.mark.parametrize("retrains", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_who_is_said_to_run_has_what_it_needs(kind, deep, retrains):
    problem, able = _problem(kind, deep, retrains), 0
    for request in (xp.forget(ids=[1, 2, 3]), xp.forget(label=1)):
        for one in xp.suggest(problem, request):
            if one.runs:
                able += 1
                method = registry.get(one.method).create(QUICK.get(one.method, {}))
                try:
                    xp.unlearn(problem, request, method, runtime=xp.Runtime(threads=1))
                except NeedsError as error:
                    pytest.fail(f"{one.method} was said to run: {error}")
                except xp.ExpungeError:  # a method may find a reason on its way
                    continue
    assert able > 8


def test_methods_of_classes_are_not_for_numbers():
    found = by_name(xp.suggest(_problem("regression", True, True), xp.forget(label=1)))
    for name in ("random-label", "amnesiac", "salun", "unsir"):
        assert "needs classes" in found[name].missing
    assert found["gaussian-amnesiac"].runs and found["finetune"].runs


def test_a_model_of_one_layer_has_nothing_before_its_last():
    request = xp.forget(ids=[1])
    for deep in (False, True):
        one = by_name(xp.suggest(_problem("classification", deep, False), request))["laf"]
        assert one.runs == deep and ("before the last layer" in (one.missing or "")) != deep


def test_nothing_is_run_and_nothing_is_changed(table):
    before = hash_model(table.model)
    found = xp.suggest(table, xp.forget(label=3))
    assert hash_model(table.model) == before
    assert all(one.evidence == () for one in found)


def test_a_request_nobody_can_answer_is_refused(table):
    with pytest.raises(xp.UserError, match="no sample"):
        xp.suggest(table, xp.forget(label=77))
    with pytest.raises(xp.UserError, match="nomethod"):
        xp.suggest(table, xp.forget(label=3), methods=["nomethod"])


def test_evidence_is_of_the_same_kind_and_the_nearest_first(digits, store):
    found = xp.suggest(digits, xp.forget(label=3), methods=SOME, store=store)
    named = by_name(found)
    assert [e.alike for e in named["finetune"].evidence] == [True, False]
    (seen,) = named["ssd"].evidence
    assert (seen.workload, seen.request) == ("digits-class", "label 7")
    assert named["unsir"].evidence == ()
    # what was seen on a whole class ranks these two, and they go before those never seen
    first = sorted(("ssd", "finetune"), key=lambda n: named[n].evidence[0].distance)
    assert [one.method for one in found[:2]] == first
    samples = xp.suggest(digits, xp.forget(fraction=0.1), methods=SOME, store=store)
    assert [e.alike for e in by_name(samples)["finetune"].evidence] == [True, False]
    assert samples[0].method == "finetune"


def test_distance_is_the_leaderboards(digits, store):
    from expunge.report.leaderboard import distance
    from expunge.suite.stored import comparison_of

    one = by_name(xp.suggest(digits, xp.forget(label=3), store=store))["ssd"].evidence[0]
    (row,) = comparison_of(store, [one.run]).data["comparisons"][0]["rows"]
    assert one.distance == distance(row)
    assert one.cost_ratio == row["cost_ratio"]


def test_another_kind_of_problem_has_no_evidence_here(store):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    problem = xp.Regression(torch.nn.Linear(3, 1), xp.Data((x, x.sum(1))))
    found = xp.suggest(problem, xp.forget(ids=[1, 2]), store=store)
    assert all(one.evidence == () for one in found)
    named = by_name(found)
    assert named["finetune"].runs
    assert not named["concept-poison"].runs


def test_on_the_command_line(store, capsys):
    from expunge.cli.suggest import suggest

    suggest(workload="digits-class", store=str(store.folder), threads=1, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"problem", "kind", "request", "suggestions"}
    assert document["request"]["text"] == "label 3"
    assert {one["method"] for one in document["suggestions"]} == set(registry)
    found = {one["method"]: one for one in document["suggestions"]}
    assert found["ssd"]["evidence"][0]["request"] == "label 7"
    suggest(workload="digits-class", store=str(store.folder), threads=1)
    shown = capsys.readouterr().out
    assert "blindspot is for regression problems" in " ".join(shown.split())
    assert "nothing in the store" in " ".join(shown.split())
