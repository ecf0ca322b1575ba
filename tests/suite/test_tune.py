"""Tuning: on other samples than the reported, within its budget, and the same when stopped."""

from __future__ import annotations

import copy
import json
import tomllib
from typing import ClassVar

import pytest
import torch

import expunge as xp
from expunge.core.audit import Finding
from expunge.core.errors import Interrupted, NeedsError, SettingError, UserError
from expunge.core.runtime import Runtime
from expunge.methods import registry
from expunge.suite.search import Budget, Trial
from expunge.suite.space import space_of
from expunge.suite.suite import suite_from
from expunge.suite.tune import apart, keep_apart, terms, write_tuning

RUNTIME = Runtime(threads=1)
SEVEN, THREE = xp.forget(label=7), xp.forget(label=3)
SPACE = {"lr": (1e-3, 1.0, "log"), "epochs": [1, 2]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return xp.Store.open(tmp_path_factory.mktemp("store"))


def search(problem, store, trials, **options):
    options = {"space": SPACE, "references": 1, "reported": THREE, "runtime": RUNTIME} | options
    return xp.tune(problem, "finetune", SEVEN, trials=trials, store=store, **options)


@pytest.fixture(scope="module")
def found(digits, store):
    return search(digits, store, 6)


def test_the_best_trial_wins_and_every_trial_is_there(found, digits):
    assert len(found.trials) == 6
    values = [t.value for t in found.trials]
    assert found.value == min(values) <= values[0]
    best = found.trials[values.index(found.value)]
    assert {k: found.settings[k] for k in best.settings} == best.settings
    assert len({t.settings["lr"] for t in found.trials}) == 6
    for trial in found.trials:
        assert trial.seconds > 0 and trial.reason is None
        assert trial.value == pytest.approx(sum(trial.terms.values()) / len(trial.terms))
        assert {"accuracy/forget-test", "accuracy/retain-test", "membership/auc-loss"} <= set(trial.terms)  # fmt: skip


def test_the_first_trial_is_the_method_as_it_came(found, digits, store):
    method = xp.methods.FineTune(**digits.tuned["finetune"])
    outcome = xp.unlearn(_with_valid_as_test(digits), SEVEN, method, runtime=RUNTIME)
    findings = xp.audit(outcome, ["accuracy"], references=1, store=store, runtime=RUNTIME)
    first = found.trials[0].terms
    for finding in findings:
        if finding.gap is not None:
            assert first[finding.name] == pytest.approx(abs(finding.gap))


def test_the_result_is_a_method_for_compare_and_suites(found, digits, store, tmp_path):
    write_tuning(found, tmp_path / "tuned.toml")
    text = (tmp_path / "tuned.toml").read_text()
    assert "label 7" in text and "label 3" in text
    spec = suite_from({"name": "s", "problem": [{"workload": "digits-class"}], **tomllib.loads(text)})  # fmt: skip
    assert spec.methods == [found.spec]
    write_tuning(found, tmp_path / "tuned.json")
    loaded = json.loads((tmp_path / "tuned.json").read_text())
    assert loaded["method"] == found.spec and len(loaded["trials"]) == 6
    compared = xp.compare(_with_valid_as_test(digits), SEVEN, [found.spec], references=1, audits=["accuracy"], store=store, runtime=RUNTIME)  # fmt: skip
    row = compared.rows[-1]
    assert {k: row["settings"]["in_force"][k] for k in found.settings} == found.settings
    best = next(t for t in found.trials if t.value == found.value)
    for name in ("accuracy/forget-test", "accuracy/retain-test"):
        assert abs(row["findings"][name]["gap"]) == pytest.approx(best.terms[name])
    with pytest.raises(UserError, match=r"\.toml or \.json"):
        write_tuning(found, tmp_path / "tuned.yaml")


def test_the_record_says_what_it_was_tuned_on(found, store):
    record = store.get(found.run).record
    assert record["tuning"][0]["label"] == [7] and record["reported"]["label"] == [3]
    assert record["budget"] == {"trials": 6, "seconds": None}
    assert record["space"]["lr"] == {"low": 1e-3, "high": 1.0, "log": True, "whole": False}
    assert len(record["trials"]) == 6 and record["packages"]["torch"]


def test_settings_of_the_problem_and_of_the_caller_stay(digits, store):
    spec = {"name": "finetune", "weight_decay": 0.01}
    found = xp.tune(digits, spec, SEVEN, reported=THREE, trials=2, references=1, store=store, runtime=RUNTIME, space={"epochs": [1]})  # fmt: skip
    assert found.settings["weight_decay"] == 0.01 and found.settings["epochs"] in (1, 5)
    assert 0.02 <= found.settings["lr"] <= 2  # about the tuned 0.2 and not the default


class _Killer(xp.Runtime().reporter.__class__):
    def __init__(self, after):
        self.left = after

    def advance(self, task, steps=1):
        if task.startswith("tune"):
            self.left -= steps
        if self.left < 0:
            raise Interrupted("stopped on purpose")


def test_stopped_and_called_again_it_is_one_search(found, digits, tmp_path):
    store = xp.Store.open(tmp_path)
    with pytest.raises(Interrupted):
        search(digits, store, 6, runtime=Runtime(threads=1, reporter=_Killer(2)))
    tried = []
    again = search(digits, store, 4, runtime=Runtime(threads=1, reporter=_Counter(tried)))
    assert 0 < len(tried) <= 2  # three were finished before
    assert [t.settings for t in again.trials] == [t.settings for t in found.trials[:4]]
    more = search(digits, store, 6)  # a larger budget goes on from the smaller one
    assert [t.settings for t in more.trials] == [t.settings for t in found.trials]
    assert [t.value for t in more.trials] == [t.value for t in found.trials]
    assert search(digits, store, 6).run == more.run  # nothing is left to do


def test_a_smaller_budget_takes_the_first_trials_of_a_longer_search(found, digits, store, tmp_path):
    small = search(digits, store, 2)
    fresh = search(digits, xp.Store.open(tmp_path), 2)
    assert [(t.settings, t.value) for t in small.trials] == [
        (t.settings, t.value) for t in found.trials[:2]
    ]
    assert small.budget == Budget(trials=2) and len(fresh.trials) == 2
    assert [(t.settings, t.value) for t in fresh.trials] == [
        (t.settings, t.value) for t in small.trials
    ]
    assert small.settings == fresh.settings and small.value == fresh.value
    assert len(search(digits, store, 6).trials) == 6  # nothing of the longer one is lost


def test_the_trials_a_budget_pays_for():
    trials = [Trial({}, 0.5, seconds) for seconds in (2.0, 3.0, 4.0)]
    assert Budget(trials=5).within(trials) == trials
    assert Budget(seconds=2.5).within(trials) == trials[:2]  # the second ends after it
    assert Budget(trials=1, seconds=100.0).within(trials) == trials[:1]
    assert Budget(seconds=9.0).within(trials) == trials


class _Counter(_Killer):
    def __init__(self, tried):
        self.tried = tried

    def advance(self, task, steps=1):
        if task.startswith("tune") and steps == 1:
            self.tried.append(task)


def test_a_kill_in_the_middle_of_a_trial_costs_that_trial_only(
    found, digits, tmp_path, monkeypatch
):
    from expunge.suite import tune as module

    store, calls, real = xp.Store.open(tmp_path), [], module.unlearn

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "unlearn", dying)
    with pytest.raises(KeyboardInterrupt):
        search(digits, store, 6)
    again = search(digits, store, 4)
    assert [t.settings for t in again.trials] == [t.settings for t in found.trials[:4]]


def test_seconds_end_it(digits, store):
    found = search(digits, store, None, seconds=0.001, references=2)
    assert len(found.trials) == 1  # the first one ends after the budget
    assert search(digits, store, None, seconds=0.001, references=2).trials == found.trials


def test_settings_that_do_not_work_are_trials_with_a_reason(digits, store):
    spec = {"name": "ssd", "alpha": "auto"}
    found = xp.tune(digits, spec, SEVEN, reported=THREE, trials=2, references=1, store=store, runtime=RUNTIME, space={"alpha": [1000.0]})  # fmt: skip
    assert found.trials[1].value is None and "selects nothing" in found.trials[1].reason
    assert found.value == found.trials[0].value and "alpha" not in found.settings
    with pytest.raises(xp.ExpungeError, match="none of 1 trials"):
        xp.tune(digits, {"name": "ssd", "alpha": 1000.0}, SEVEN, reported=THREE, trials=1, references=1, store=store, runtime=RUNTIME, space={"lam": (0.1, 1.0)})  # fmt: skip


def _failing(monkeypatch, error, nth=2):
    from expunge.suite import tune as module

    calls, real = [], module.unlearn

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == nth:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(module, "unlearn", failing)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("the matrix is singular"), OverflowError("too large"), torch.linalg.LinAlgError("no factor")],
)  # fmt: skip
def test_a_trial_that_breaks_is_a_trial_with_a_reason(digits, tmp_path, monkeypatch, error):
    store = xp.Store.open(tmp_path)
    _failing(monkeypatch, error)
    found = search(digits, store, 3)
    assert len(found.trials) == 3 and found.trials[1].value is None
    assert str(error) in found.trials[1].reason and type(error).__name__ in found.trials[1].reason
    monkeypatch.undo()  # what is in the store is not tried again
    assert search(digits, store, 3).trials == found.trials


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory: 8 bytes")]
)
def test_a_machine_without_memory_is_no_trial(digits, tmp_path, monkeypatch, error):
    store = xp.Store.open(tmp_path)
    _failing(monkeypatch, error)
    with pytest.raises(type(error)):
        search(digits, store, 3)
    monkeypatch.undo()
    assert all(t.value is not None for t in search(digits, store, 2).trials)


def _with_valid_as_test(digits):
    return xp.Classification(digits.model, digits.train, digits.valid, recipe=digits.recipe)


def test_trials_look_at_validation_data_and_never_at_test_data(digits, store, monkeypatch):
    problem, test = copy.copy(digits), copy.copy(digits.test)
    problem.test, problem._hashes = test, {}
    test.fingerprint()  # a part of what the problem is called, and read for that only
    for reads in ("fetch", "labels_of"):
        monkeypatch.setattr(test, reads, lambda ids: pytest.fail("test data was read"))
    found = search(problem, store, 2, references=2)
    assert found.unseen == "validation" and store.get(found.run).record["unseen"] == "validation"
    assert "unseen samples: validation data" in found.toml()


def test_without_validation_data_it_says_that_test_data_is_looked_at(found, digits, store):
    bare, said = copy.copy(digits), []
    bare.valid = None
    on_test = search(bare, store, 1, runtime=Runtime(threads=1, reporter=_Sayer(said)))
    assert on_test.unseen == "test" and "unseen samples: test data" in on_test.toml()
    assert any("valid=" in line for line in said)
    assert on_test.trials[0].terms != found.trials[0].terms


class _Sayer(xp.Runtime().reporter.__class__):
    def __init__(self, said):
        self.said = said

    def say(self, text):
        self.said.append(text)


def test_the_reported_request_is_refused(digits, store):
    overlapping = xp.forget(where="label == 3 and id < 400 or label == 7")
    for bad in (THREE, overlapping, [SEVEN, overlapping], xp.forget(fraction=0.1, seed=1)):
        with pytest.raises(UserError, match="also in the one to be reported"):
            xp.tune(digits, "finetune", bad, reported=THREE, trials=1, store=store)
    keep_apart(digits, [SEVEN], THREE)


def test_random_samples_are_drawn_apart_from_the_reported(digits):
    reported = xp.forget(fraction=0.1, seed=3)
    drawn = apart(digits, reported, 0.1, seed=11)
    keep_apart(digits, [drawn], reported)
    assert len(drawn.resolve(digits.train)) == 120
    assert drawn.ids == apart(digits, reported, 0.1, seed=11).ids
    assert drawn.ids != apart(digits, reported, 0.1, seed=12).ids
    with pytest.raises(SettingError):
        apart(digits, reported, 0.95)


def test_a_difficulty_picks_what_to_tune_on(digits, store):
    hard = xp.difficulty(digits, "el2n", runs=1, epoch=1, runtime=RUNTIME)
    reported = xp.forget(fraction=0.1, seed=3)
    among = digits.train.without(reported.resolve(digits.train))
    request = hard.request("high", count=40, among=among)
    found = xp.tune(digits, "finetune", request, reported=reported, trials=1, references=1, store=store, runtime=RUNTIME, space=SPACE)  # fmt: skip
    assert found.value >= 0 and found.tuning == (request,)


def test_space_of_settings():
    method = xp.methods.FineTune(epochs=4, lr=0.2)
    assert space_of(method) == {
        "epochs": {"low": 2, "high": 8, "log": False, "whole": True},
        "lr": {"low": pytest.approx(0.02), "high": 2.0, "log": True, "whole": False},
    }
    given = space_of(method, {"momentum": (0.1, 0.9), "lr": [0.1], "train": ["full", "last(1)"]})
    assert given["momentum"] == {"low": 0.1, "high": 0.9, "log": False, "whole": False}
    assert given["lr"] == {"choices": [0.1]} and given["train"]["choices"] == ["full", "last(1)"]
    for bad in ({"rate": [1]}, {"lr": []}, {"lr": (1, 0)}, {"lr": (0, 1, "log")}, {"lr": (1, 2, "up")}, {"lr": 3}):  # fmt: skip
        with pytest.raises(SettingError):
            space_of(method, bad)
    with pytest.raises(SettingError, match="no number to search"):
        space_of(xp.methods.Retrain())


def test_terms_of_a_distance():
    findings = [
        Finding("accuracy/forget-test", 0.2, reference=0.5),
        Finding("regression-error/mae-forget-test", 30.0, reference=20.0),
        Finding("divergence/js-forget-train", 0.3, "down", reference=0.1),
        Finding("accuracy/retain-test", 0.2, reason="no reference"),
    ]
    assert terms(findings) == {
        "accuracy/forget-test": pytest.approx(0.3),
        "regression-error/mae-forget-test": pytest.approx(0.5),
    }
    with pytest.raises(xp.ExpungeError, match="no reference"):
        terms(findings[2:])


def test_what_is_missing_is_said_before_any_work(digits, store):
    for options in ({}, {"trials": 0}, {"seconds": -1.0}):
        with pytest.raises(SettingError):
            xp.tune(digits, "finetune", SEVEN, reported=THREE, store=store, **options)
    bare = xp.Classification(digits.model, digits.train, digits.test)
    with pytest.raises(NeedsError, match="recipe="):
        xp.tune(bare, "finetune", SEVEN, reported=THREE, trials=1, store=store)
    with pytest.raises(UserError, match="at least one request"):
        xp.tune(digits, "finetune", [], reported=THREE, trials=1, store=store)


def test_without_optuna_it_says_what_to_install(digits, store, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("expunge.suite.bench.Bench.references", None)  # nothing is trained first
    with pytest.raises(UserError, match=r"expunge\[tune\]"):
        search(digits, store, 7)


def test_space_is_what_the_method_names_or_all_its_numbers():
    ssd = space_of(xp.methods.SSD())
    assert ssd["alpha"] == {"low": 1.0, "high": 10.0, "log": True, "whole": False}
    assert set(ssd) == {"alpha", "lam"}  # alpha is a word by default, and still searched
    assert set(space_of(xp.methods.SCRUB())) == {"epochs", "lr", "max_epochs"}
    assert space_of(xp.methods.ModHiFiU())["contrast"] == {"choices": [False, True]}

    class Plain(xp.methods.SCRUB):
        search: ClassVar = {}

    assert {"gamma", "alpha", "temperature", "lr"} <= set(space_of(Plain()))


@pytest.mark.parametrize("name", list(registry))
def test_every_setting_a_method_names_to_search_is_one_of_its_own(name):
    cls = registry.get(name)
    assert set(cls.search) <= {s["name"] for s in cls.describe_settings()}
    for setting, given in cls.search.items():
        for value in given if isinstance(given, list) else (given or ())[:2]:
            assert getattr(cls(**{setting: value}), setting) == value
