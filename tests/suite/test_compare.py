"""Compare, audit, reproduce, report from records: the same numbers by different ways."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import StoreError, UserError
from expunge.suite.bench import Bench
from expunge.suite.reproduce import reproduce
from expunge.suite.stored import comparison_of
from expunge.suite.suite import suite_from


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return xp.Store.open(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def jobs():
    return []


@pytest.fixture(scope="module")
def bench(store, jobs):
    return Bench(store, xp.Runtime(threads=1), lambda *job: jobs.append(job))


@pytest.fixture(scope="module")
def comparison(bench):
    problem = bench.workload("digits-class")
    return xp.compare(
        problem, xp.forget(label=3), ["retrain", "finetune", {"name": "ssd", "alpha": "auto"}],
        seeds=[0, 1], references=2, bench=bench,
    )  # fmt: skip


def test_rows_follow_the_contract(comparison):
    rows = comparison.rows
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("original", 0), ("retrain", 1001), ("finetune", 0), ("finetune", 1), ("ssd", 0), ("ssd", 1),
    ]  # fmt: skip
    for row in rows:
        assert {"method", "seed", "cost_ratio", "seconds", "findings"} <= set(row)
        for name in ("forget-train", "retain-train", "forget-test", "retain-test"):
            finding = row["findings"][f"accuracy/{name}"]
            assert {"value", "reference", "gap", "low", "high", "direction", "reason"} <= set(
                finding
            )
            assert finding["gap"] == pytest.approx(finding["value"] - finding["reference"])
        for family in ("membership/", "cka/", "divergence/"):
            assert any(n.startswith(family) for n in row["findings"])
    json.dumps(comparison.data, allow_nan=False)


def test_numbers_are_those_of_the_models(comparison, store, bench):
    """A row's accuracy equals one computed by hand from the stored weights."""
    problem = bench.workload("digits-class")
    row = next(r for r in comparison.rows if r["method"] == "ssd")
    model = nn.Sequential(*problem.recipe.build().children())
    model.load_state_dict({**problem.model.state_dict(), **store.tensors(row["run"])})
    test = problem.test.fetch(problem.test.ids)
    three = test.y == 3
    with torch.no_grad():
        right = model(test.x).argmax(1) == test.y
    findings = row["findings"]
    assert findings["accuracy/forget-test"]["value"] == pytest.approx(
        float(right[three].float().mean())
    )
    assert findings["accuracy/retain-test"]["value"] == pytest.approx(
        float(right[~three].float().mean())
    )


def test_references_do_not_know_the_class(comparison):
    for row in comparison.rows:
        assert row["findings"]["accuracy/forget-test"]["reference"] <= 0.02
        assert row["findings"]["accuracy/retain-test"]["reference"] > 0.9


def test_a_second_comparison_takes_everything_from_the_store(comparison, bench, jobs, store):
    before = len(store.runs())
    jobs.clear()
    again = xp.compare(
        bench.workload("digits-class"), xp.forget(label=3), ["finetune", "ssd"],
        seeds=[0, 1], references=2, bench=bench,
    )  # fmt: skip
    assert all(reused for _, _, reused, _ in jobs)
    assert len(store.runs()) == before
    by_name = {(r["method"], r["seed"]): r for r in comparison.rows}
    for row in again.rows:
        assert row["findings"] == by_name[row["method"], row["seed"]]["findings"]


def test_another_request_or_setting_is_another_key(bench, jobs):
    problem = bench.workload("digits-class")
    jobs.clear()
    bench.unlearn(problem, xp.forget(label=3), xp.methods.SSD(lam=0.5), 0)
    bench.unlearn(problem, xp.forget(label=5), xp.methods.SSD(), 0)
    bench.unlearn(problem, xp.forget(label=5, reason="letter of 3 May"), xp.methods.SSD(), 0)
    assert [reused for _, _, reused, _ in jobs] == [False, False, True]


def test_runs_diff_names_exactly_the_edited_setting(bench, store):
    problem, request = bench.workload("digits-class"), xp.forget(label=3)
    _, a = bench.unlearn(problem, request, xp.methods.SSD(), 0, {})
    _, b = bench.unlearn(problem, request, xp.methods.SSD(lam=0.25), 0, {"lam": 0.25})
    assert [name for name, *_ in store.diff(a, b)] == ["method.lam"]


def test_reproduce_gives_the_same_bits_for_every_kind_of_run(comparison, store):
    kinds = set()
    for run in store.runs():
        if run.kind != "audit":
            result = reproduce(run, store, xp.Runtime())
            assert result.identical, (run.kind, run.method)
            kinds.add(run.kind)
    assert kinds == {"original", "reference", "unlearn"}


def test_reproduce_notices_other_data(comparison, store, monkeypatch):
    run = next(r for r in store.runs(kind="unlearn"))
    monkeypatch.setattr(xp.Data, "fingerprint", lambda self: "something else")
    with pytest.raises(StoreError, match="changed since"):
        reproduce(run, store, xp.Runtime())


def test_report_from_records_equals_the_comparison(comparison, store):
    chosen = [r["run"] for r in comparison.rows if r["method"] not in ("original", "retrain")]
    rebuilt = comparison_of(store, chosen)
    by_run = {r["run"]: r for r in comparison.rows}
    assert [r["run"] for r in rebuilt.rows] == chosen
    for row in rebuilt.rows:
        assert row["findings"] == by_run[row["run"]]["findings"]
        assert row["seconds"] == by_run[row["run"]]["seconds"]


def test_audit_of_an_outcome_without_a_store_and_without_a_recipe():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    problem = xp.Classification(nn.Linear(5, 3), (x, y), (x[:30] + 0.1, y[:30]))
    outcome = xp.unlearn(problem, xp.forget(ids=[1, 2, 3]), xp.methods.FineTune(epochs=1))
    findings = {f.name: f for f in xp.audit(outcome, "standard", references=3)}
    found = findings["accuracy/retain-train"]
    assert found.value is not None
    assert found.reference is None
    assert "no retrained reference" in found.reason


def test_needs_are_checked_before_anything_is_trained(bench, jobs):
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    problem = xp.Classification(nn.Linear(5, 3), (x, y))
    jobs.clear()
    with pytest.raises(UserError, match="validation"):
        xp.compare(problem, xp.forget(label=1), [xp.methods.SCRUB(rewind=True)], bench=bench)
    assert jobs == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ["sdd"]}, "did you mean ssd"),
        ({"methods": [{"name": "ssd", "lamb": 1}]}, "no setting 'lamb'"),
        ({"audits": ["accurcy"]}, "did you mean accuracy"),
        ({"problem": []}, "problem"),
        ({"references": -1}, "references"),
        ({"colour": "blue"}, "colour"),
        ({"problem": [{"workload": "digits"}]}, "digits-class"),
        ({"problem": [{"workload": "digits-class", "requests": [{"lable": 3}]}]}, "lable"),
    ],
)
def test_a_suite_is_checked_before_it_runs(change, says):
    good = {"name": "x", "methods": ["ssd"], "problem": [{"workload": "digits-class"}]}
    suite_from(good)
    with pytest.raises(UserError, match=says):
        suite_from({**good, **change})


def small(recipe=None, each=None, activation=nn.ReLU):
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(5, 4), activation(), nn.Linear(4, 3))
    if each is None:
        return xp.Classification(model, (x, y), (x[:30] + 0.1, y[:30]), recipe=recipe)
    return xp.Problem.of(model, (x, y), each_loss=each)


def test_references_of_another_recipe_are_not_reused(store):
    def factory(shift):
        def recipe(keep, seed):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
            nn.init.constant_(model[2].bias, shift)
            return model

        return recipe

    found = []
    for shift in (1.0, 2.0, 1.0):
        bench = Bench(store, xp.Runtime(threads=1))
        (made,) = bench.references(small(factory(shift)), xp.forget(label=1), 1)
        found.append((made.reused, float(made.model[2].bias.detach().mean())))
    assert found == [(False, 1.0), (False, 2.0), (True, 1.0)]


def test_results_of_another_loss_or_architecture_are_not_reused(store):
    bench = Bench(store, xp.Runtime(threads=1))

    def loss(factor):
        def each(model, batch):
            return factor * nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")

        return each

    tune, request = xp.methods.FineTune(epochs=1, lr=0.1), xp.forget(ids=[1, 2])
    runs = [
        bench.unlearn(problem, request, tune, 0)[1]
        for problem in (
            small(each=loss(1.0)),
            small(each=loss(5.0)),
            small(),
            small(activation=nn.Tanh),
        )
    ]
    assert len(set(runs)) == 4
    assert bench.unlearn(small(each=loss(1.0)), request, tune, 0)[1] == runs[0]


def test_the_same_samples_by_id_and_by_label_have_findings_of_their_own(store):
    bench = Bench(store, xp.Runtime(threads=1))
    problem = small()
    by_id = xp.forget(ids=problem.train.ids[problem.train.labels == 1].tolist())
    rows = {
        name: xp.compare(problem, request, ["finetune"], audits=["accuracy"], bench=bench).rows
        for name, request in (("ids", by_id), ("label", xp.forget(label=1)))
    }
    for row in rows["ids"]:
        assert row["findings"]["accuracy/forget-test"]["value"] is None
    for row in rows["label"]:
        assert row["findings"]["accuracy/forget-test"]["value"] is not None


def test_an_audit_in_parts_is_reported_whole(comparison, store, bench):
    run = next(r["run"] for r in comparison.rows if r["method"] == "ssd")
    before = set(comparison_of(store, [run]).rows[0]["findings"])
    outcome = bench.stored_outcome(
        store.get(run), bench.workload("digits-class"), xp.forget(label=3)
    )
    xp.audit(outcome, ["cost"], references=2, store=store, runtime=xp.Runtime(threads=1), run=run)
    assert set(comparison_of(store, [run]).rows[0]["findings"]) == before
