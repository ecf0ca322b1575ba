"""Every audit leaves the global random generators as they were, whatever it draws or trains."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits import registry
from expunge.suite import checks

QUICK = {
    "models": 40, "targets": 4, "fprs": (0.25,), "method": "finetune", "fewest": 5, "tasks": 10, "steps": 2,
    "repeats": 1, "cap": 5, "resamples": 20, "injections": 10, "halves": 2, "thresholds": 11, "draws": 1,
    "group": "entity", "samples": 20, "shots": (1,), "distractors": (2,), "curve": (1,),
}  # fmt: skip
OTHER = {
    "memorised-fraction": {"members": "retain"},
    "representation": {"samples": 200},
    "recovery": {"shots": 1},
}
"""Settings of audits that mean something else by a name, or train where they are set so."""


def net():
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 4)
    )


@functools.cache
def classified():
    """Subjects of people in four classes: the original, and others that differ from it by chance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(360, 6, generator=generator)
    y = torch.randint(0, 4, (360,), generator=generator)
    people = np.arange(360) // 6
    train = xp.Data((x[:180], y[:180]), columns={"identity": people[:180], "true": y[:180].numpy()})
    unseen = (np.arange(180) < 90).astype(int)
    test = xp.Data((x[180:], y[180:]), columns={"identity": people[180:], "unseen": unseen, "affected": unseen})  # fmt: skip
    recipe = xp.ClassifierRecipe(net, train, epochs=1, batch_size=30)
    problem = xp.Classification(recipe(train.ids, 0), train, test, recipe=recipe)
    request = xp.forget(label=(0, 1))
    keep = train.without(request.resolve(train))
    made = [xp.Subject(recipe(keep, s), problem, request, xp.Runtime(), cost=xp.Cost(seconds=1.0)) for s in range(15)]  # fmt: skip
    made[0].siblings = tuple(made[1:5])
    return made[0], made[5:]


@functools.cache
def of_kind(domain):
    problem, request = checks.problem_for(domain), checks.request_for(domain)
    models = problem.model, checks.reference_for(domain, 1001), checks.reference_for(domain, 1002)
    made = [xp.Subject(m, problem, request, xp.Runtime(), cost=xp.Cost(seconds=1.0)) for m in models]  # fmt: skip
    return made[0], made[1:]


def state():
    """What the global generators would give next, without asking them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    own = [torch.random.get_rng_state(), *gpus]
    return [str(python), str(numpy[1].tolist()), str(numpy[2:]), *(str(t.tolist()) for t in own)]


@pytest.mark.parametrize("name", list(registry))
def test_no_audit_moves_the_global_generators(name):
    cls = registry.get(name)
    known = {s["name"] for s in cls.describe_settings()}
    audit = cls.create({k: v for k, v in (QUICK | OTHER.get(name, {})).items() if k in known})
    there = audit.domain if audit.domain in ("regression", "causal-lm") else "general"
    subject, references = classified() if there == "general" else of_kind(there)
    if name == "memorised-fraction":
        references = references[:1]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    before = state()
    found = audit.run(subject, references, xp.Runtime(threads=1))
    assert any(f.value is not None for f in found), [f.reason for f in found]
    assert state() == before, "it drew from, or seeded, a generator that belongs to everybody"
