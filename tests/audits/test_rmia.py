"""rmia: scores by hand, its population, chance, power and reasons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shadow_worlds import World

from expunge.audits import _shadow_attack
from expunge.audits._shadow_attack import ground
from expunge.audits.rmia import RMIA, log_average, parted, share_beaten
from expunge.audits.run import stratified
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata
from expunge.fleet.shadows import Shadows


@pytest.fixture
def world(tables, margins, monkeypatch):
    def make(**settings):
        made = World(tables, margins, **{"hard": 1.0, **settings})
        monkeypatch.setattr(_shadow_attack, "shadows", lambda *a: made.shadows)
        return made

    return make


def run(subjects, by_name, **settings):
    return by_name(RMIA(**settings).run(subjects[1], subjects[2:], Runtime()))


def test_scores_are_the_papers_by_hand():
    rng = np.random.default_rng(0)
    masks, odds = rng.random((20, 5)) < 0.5, rng.normal(size=(20, 5))
    made = Shadows(torch.from_numpy(masks), torch.from_numpy(odds), torch.arange(3), torch.arange(2), True)  # fmt: skip
    p = 1 / (1 + np.exp(-odds))
    out = [p[~masks[:, i], i].mean() for i in range(5)]
    inside = [p[masks[:, i], i].mean() for i in range(5)]
    online, offline = (log_average(made, a).exp().numpy() for a in (None, 0.3))
    assert online == pytest.approx([(i + o) / 2 for i, o in zip(inside, out, strict=True)])
    assert offline == pytest.approx([(1.3 * o + 0.7) / 2 for o in out])
    assert log_average(made, 1.0).exp().numpy() == pytest.approx(out)
    x, z = np.array([0.5, 0.9]), np.array([0.2, 0.25, 0.3, 0.6])
    got = share_beaten(np.log(x), np.log(z), 2.0)
    assert got.tolist() == [np.mean(v / z >= 2.0) for v in x] == [0.5, 0.75]


def test_certain_models_stay_finite():
    odds = torch.tensor([[-900.0, 900.0], [-900.0, 900.0]])
    made = Shadows(torch.tensor([[True, False], [False, True]]), odds, torch.arange(1), torch.arange(1), True)  # fmt: skip
    assert bool(torch.isfinite(log_average(made, None)).all())
    assert bool(torch.isfinite(log_average(made, 1.0)).all())


def test_exchangeable_samples_are_at_chance(world, by_name):
    alarms = dict.fromkeys(["rmia/auc-online", "rmia/auc-offline", "rmia/tpr-online-at-0.1"], 0)
    for seed in range(40):
        w = world(seed=seed)
        found = run(w.subjects(w.logits(2.0), w.logits()), by_name)
        for name in alarms:
            alarms[name] += found[name].low > (0.1 if "tpr" in name else 0.5)
    assert max(alarms.values()) <= 5, alarms


def test_planted_members_are_found(world, by_name):
    w = world()
    found = run(w.subjects(w.logits(2.0), w.logits(2.0), w.logits(), w.logits()), by_name)
    for variant in ("online", "offline"):
        f = found[f"rmia/auc-{variant}"]
        assert f.low > 0.6 and f.reference < 0.62 and f.detail["gamma"] == 1.0
        assert f.detail["auc"] > 0.5 and f.detail["roc"]["side"] == "member"
    assert 80 <= found["rmia/auc-online"].detail["population"] <= 120  # about half of 200


def test_over_forgetting_is_found_as_memory_is(world, by_name):
    w = world()
    found = run(w.subjects(w.logits(2.0), w.logits(-3.0), w.logits()), by_name)
    assert found["rmia/auc-online"].low > 0.6 and found["rmia/auc-online"].detail["auc"] < 0.4


def test_the_population_is_apart_from_the_non_members(world):
    w = world()

    def parts(request, who):
        (s,) = w.subjects(w.logits(), request=request)
        at = parted(s, ground(s, [], who, 4, Runtime()), Runtime())
        return at.places, at.population

    for who in ("matched", "test"):
        places, population = parts(Request(ids=tuple(range(60))), who)
        mine, others = (set(p["retain-test"].tolist()) for p in (places, population))
        assert not mine & others and len(mine) >= 80 and len(others) >= 80
    # a class: the population are samples of it, not of the classes that are kept
    places, population = parts(Request(label=1), "matched")
    assert set(places) == set(population) == {"forget-test"}
    assert abs(len(places["forget-test"]) - len(population["forget-test"])) <= 1


def test_strata(world, by_name):
    w = world()
    subjects = w.subjects(w.logits(2.0), w.logits(2.0), w.logits())
    whole = RMIA().run(subjects[1], subjects[2:], Runtime())
    parts = Strata({"a": torch.arange(25), "b": torch.arange(25, 60)})
    found = by_name(stratified(RMIA(), whole, parts, subjects[1], subjects[2:], Runtime()))
    for part, size in (("a", 25), ("b", 35)):  # with non-members and a population of their own
        f = found[f"rmia/auc-online@{part}"]
        assert len(f.per_sample["score"]) == size and f.low > 0.55 > f.reference - 0.1


def test_reasons(world, by_name):
    w = world(m=16)
    found = RMIA(nonmembers="test").run(*_of(w), Runtime())
    assert all(f.value is None and "half of them are the population" in f.reason for f in found)
    w = world(both=False)
    found = by_name(RMIA().run(*_of(w), Runtime()))
    assert "cannot be run on test data" in found["rmia/auc-online"].reason
    assert found["rmia/auc-offline"].value is not None
    w = world()
    flat = w.subjects(w.logits(), w.margins(w.y, np.full(360, -800.0)))
    for f in RMIA().run(flat[1], [], Runtime()):
        assert f.value is None or f.reason


def _of(w):
    subjects = w.subjects(w.logits(), w.logits())
    return subjects[1], []
