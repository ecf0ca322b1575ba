"""The engine `ray`: without the package, with a stand-in for it, and with a cluster of this machine."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import types

import pytest
import torch
from fleet_recipes import conv_norm, failing, jobs_of, mlp, problem_of, recipe_of

from expunge.core.errors import ExpungeError, NeedsError, UserError
from expunge.core.runtime import Runtime
from expunge.fleet import on_ray
from expunge.fleet.executors import OneByOne, executor, in_order
from expunge.fleet.on_ray import OnRay
from expunge.fleet.train import train_fleet
from expunge.store import Store


class Cluster(types.ModuleType):
    """What the engine uses of Ray, in this process; everything that travels is pickled."""

    def __init__(self, cores=1, fail=None):
        super().__init__("ray")
        self.cores, self.fail, self.gpus = cores, fail, 0
        self.up, self.calls, self.stored, self.results, self.most = False, [], {}, {}, 0
        self.cancelled = []

    def is_initialized(self):
        return self.up

    def init(self, **options):
        if self.fail:
            raise ConnectionError(self.fail)
        self.calls.append(("init", options))
        self.up = True

    def shutdown(self):
        self.calls.append(("shutdown", {}))
        self.up = False

    def cluster_resources(self):
        return {"CPU": float(self.cores)} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def put(self, value):
        reference = f"object {len(self.stored)}"
        self.stored[reference] = pickle.dumps(value)
        return reference

    def remote(self, **options):
        self.calls.append(("remote", options))

        def wrap(function):
            def submit(first, *arguments):
                reference = f"task {len(self.results) + len(self.cancelled)}"
                packed = self.stored[first], pickle.dumps(arguments)
                self.results[reference] = (function, packed)
                self.most = max(self.most, len(self.results))
                return reference

            return types.SimpleNamespace(remote=submit)

        return wrap

    def wait(self, references, num_returns):
        return references[-num_returns:], references[:-num_returns]  # the last is ready first

    def get(self, reference):
        function, (first, rest) = self.results.pop(reference)
        self.cancelled.append(reference)  # its name is not used again
        try:
            return function(pickle.loads(first), *pickle.loads(rest))
        except Exception as error:
            wrapped = RuntimeError("a long trace")
            wrapped.cause = error
            raise wrapped from None

    def cancel(self, reference, force):
        self.calls.append(("cancel", reference))


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = Cluster()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


def run(engine, problem, jobs):
    return [d.model.state_dict() for d in in_order(engine.run(problem, jobs, Runtime()))]


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NeedsError, match=r"pip install 'expunge\[ray\]'"):
        executor("ray")


def test_tasks_travel_and_come_back(cluster):
    problem = problem_of(recipe_of())
    jobs = jobs_of(problem.train, 5)
    found = run(OnRay(), problem, jobs)
    for a, b in zip(found, run(OneByOne(), problem, jobs), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in b)
    assert cluster.most == 2, "two tasks a core at a time"
    assert [c[0] for c in cluster.calls] == ["init", "remote", "shutdown"]
    assert cluster.calls[1][1] == {"num_cpus": 1, "num_gpus": 0}
    assert "address" not in cluster.calls[0][1]


def test_a_gpu_that_no_machine_has_is_said(cluster, monkeypatch):
    real = on_ray.train_packed
    monkeypatch.setattr(on_ray, "train_packed", lambda *a: real(*a[:-1], "cpu"))
    problem = problem_of(recipe_of())
    jobs, runtime = jobs_of(problem.train, 1), Runtime(device="cuda")
    with pytest.raises(UserError, match="no machine of the Ray cluster has a GPU"):
        next(OnRay().run(problem, jobs, runtime))
    assert not cluster.up and not cluster.results, "a task was sent to wait for ever"
    cluster.gpus = 1
    assert len(list(OnRay().run(problem, jobs, runtime))) == 1
    assert ("remote", {"num_cpus": 1, "num_gpus": 1}) in cluster.calls


def test_addresses(cluster, monkeypatch):
    problem = problem_of(recipe_of())
    jobs = jobs_of(problem.train, 1)
    run(executor("ray:ray://far:10001"), problem, jobs)
    assert cluster.calls[0][1]["address"] == "ray://far:10001"
    monkeypatch.setenv("RAY_ADDRESS", "near:6379")
    cluster.calls.clear()
    run(OnRay(), problem, jobs)
    assert cluster.calls[0][1]["address"] == "near:6379"
    cluster.fail = "nobody answers"
    with pytest.raises(UserError, match=r"no Ray cluster at near:6379 \(nobody answers\)"):
        run(OnRay(), problem, jobs)


def test_a_connection_of_somebody_else_stays_open(cluster):
    cluster.up = True
    problem = problem_of(recipe_of())
    run(OnRay(), problem, jobs_of(problem.train, 2))
    assert cluster.up and [c[0] for c in cluster.calls] == ["remote"]


def test_failures_are_told_in_one_line_and_the_rest_is_cancelled(cluster):
    cluster.cores = 2
    problem = problem_of(failing)
    store = Store.temporary()
    with pytest.raises(ExpungeError, match="on the Ray cluster failed: seed 13 fails"):
        train_fleet(problem, jobs_of(problem.train), store, executor="ray")
    assert [run.seed for run in store.runs(kind="shadow")] == [14]  # the last was ready first
    assert len([c for c in cluster.calls if c[0] == "cancel"]) == 3 and not cluster.up
    diverging = problem_of(recipe_of(lr=1e200))
    with pytest.raises(ExpungeError, match="training from the recipe stopped"):
        run(OnRay(), diverging, jobs_of(diverging.train))
    local = problem_of(recipe_of(lambda: mlp()))
    with pytest.raises(UserError, match="cannot be sent to a Ray cluster"):
        run(OnRay(), local, jobs_of(local.train))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'expunge[ray]'")
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_on_this_machine_equals_the_loop():
    problem = problem_of(recipe_of(conv_norm), conv_norm)
    jobs = jobs_of(problem.train)
    found = run(OnRay(), problem, jobs)
    for a, b in zip(found, run(OneByOne(), problem, jobs), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in b)
    with pytest.raises(ExpungeError, match="training from the recipe stopped"):
        run(OnRay(), problem_of(recipe_of(lr=1e200)), jobs)
