import copy
import dataclasses

import pytest
import torch

from expunge.core.method import Method, record_of
from expunge.core.needs import Needs
from expunge.core.request import Request, forget
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.problems.classification import Classification
from expunge.store import Store
from expunge.store.diff import differences

A = {
    "created": "2026-01-01T00:00:00+00:00",
    "problem": "digits",
    "source": {"kind": "workload", "name": "digits"},
    "fingerprint": {"model": "aa", "train": "bb", "test": None},
    "request": {"label": [3], "time": "2026-01-01T00:00:00+00:00"},
    "method": {
        "name": "ssd",
        "class": "m.SSD",
        "passed": {"alpha": 10.0},
        "in_force": {"alpha": 10.0, "bound": 1.0},
    },
    "runtime": {"device": "cpu", "seed": 0, "threads": 1},
    "packages": {"torch": "2.6"},
    "weights": "cc",
    "cost": {"seconds": 1.0},
    "curve": [],
    "details": {"selected": 12},
    "findings": [{"name": "accuracy/forget", "value": 0.1}, {"name": "mia/auc", "value": 0.5}],
}


def changed(path, value):
    b = copy.deepcopy(A)
    *way, last = path.split(".")
    place = b
    for step in way:
        place = place[step]
    place[last] = value
    return b


def test_a_setting_is_one_difference_though_it_stands_in_two_places():
    b = changed("method.in_force.alpha", 20.0)
    b["method"]["passed"]["alpha"] = 20.0
    assert differences(A, b, False) == [("method.alpha", 10.0, 20.0)]


def test_a_default_written_out_is_no_difference_and_a_setting_left_out_is_compared_in_force():
    b = changed("method.passed", {"alpha": "10", "bound": 1})
    assert differences(A, b, False) == []
    b = changed("method.passed", {})
    b["method"]["in_force"]["alpha"] = 3.0
    assert differences(A, b, False) == [("method.alpha", 10.0, 3.0)]


@pytest.mark.parametrize(
    ("path", "value", "before"),
    [
        ("problem", "faces", "digits"),
        ("source.name", "faces", "digits"),
        ("fingerprint.model", "zz", "aa"),
        ("fingerprint.test", "zz", None),
        ("request.label", [4], [3]),
        ("runtime.seed", 1, 0),
        ("runtime.threads", 4, 1),
        ("packages.torch", "2.7", "2.6"),
        ("method.class", "other.SSD", "m.SSD"),
        ("version", "0.2", None),
    ],
)
def test_each_input_is_named_alone(path, value, before):
    assert differences(A, changed(path, value), False) == [(path, before, value)]
    assert differences(changed(path, value), A, False) == [(path, value, before)]


def test_times_cost_and_curve_never_count():
    b = changed("created", "later")
    b["request"]["time"] = "later"
    b["cost"], b["curve"] = {"seconds": 9.0}, [{"loss": 1.0}]
    assert differences(A, b, True) == []


def test_results_are_listed_on_demand_after_the_inputs_and_findings_by_name():
    b = changed("runtime.seed", 1)
    b["weights"] = "dd"
    b["details"] = {"selected": 13}
    b["findings"][1]["value"] = 0.75
    assert differences(A, b, False) == [("runtime.seed", 0, 1)]
    assert differences(A, b, True) == [
        ("runtime.seed", 0, 1),
        ("weights", "cc", "dd"),
        ("details.selected", 12, 13),
        ("findings.mia/auc.value", 0.5, 0.75),
    ]


def test_a_seed_in_two_places_is_named_once():
    a, b = {**A, "seed": 0}, {**changed("runtime.seed", 1), "seed": 1}
    assert differences(a, b, False) == [("runtime.seed", 0, 1)]
    assert differences({"seed": 0}, {"seed": 1}, False) == [("seed", 0, 1)]


def test_truth_is_not_one_and_absent_parts_are_named_leaf_by_leaf():
    assert differences({"recipe": {"x": True}}, {"recipe": {"x": 1}}, False) == [
        ("recipe.x", True, 1)
    ]
    b = {k: v for k, v in A.items() if k not in ("method", "request")}
    assert differences(A, b, False) == [
        ("request.label", [3], None),
        ("method.name", "ssd", None),
        ("method.alpha", 10.0, None),
        ("method.bound", 1.0, None),
    ]


@dataclasses.dataclass(frozen=True)
class Probe(Method):
    name = "probe"
    alpha: float = setting(10.0, "a", above=0)
    rate: float = setting(0.5, "b", above=0)
    needs = Needs(forget=True)


def test_two_stored_runs_that_differ_in_one_setting():
    store = Store.temporary()
    problem = Classification(torch.nn.Linear(2, 5), (torch.randn(10, 2), torch.arange(10) % 5))

    def put(request, seed=0, **passed):
        method, runtime = Probe.create(passed), Runtime(seed=seed)
        record = record_of(problem, request, method, runtime, passed)
        return store.put_run(
            kind="unlearn", key=repr((str(request), seed, passed)), record=record | {"weights": repr(passed)}
        )  # fmt: skip

    base = put(Request(label=(3,), time="2026-01-01"))
    assert store.diff(base, put(forget(label=3), alpha=20.0)) == [("method.alpha", 10.0, 20.0)]
    assert store.diff(base, put(forget(label=3), seed=5)) == [("runtime.seed", 0, 5)]
    assert store.diff(base, put(forget(label=4))) == [("request.label", [3], [4])]
    assert store.diff(base, base, results=True) == []
    both = store.diff(base, put(forget(label=3), rate=0.25), results=True)
    assert both == [("method.rate", 0.5, 0.25), ("weights", "{}", "{'rate': 0.25}")]
