"""klom: what it says of many models, of one, and of too few."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import expunge as xp
from expunge.audits._klom import klom, margins
from expunge.audits.klom import KLoM
from expunge.core.runtime import Runtime

N, M = 60, 12
"""Samples, and models a side."""


@pytest.fixture
def made(tables, some_ids):
    def make(shift, unlearned=M, references=2 * M, forget=20, spread=1.0):
        y, y_test = torch.arange(N) % 3, torch.arange(N) % 3
        rows = []
        for k in range(1 + unlearned + references):
            z = spread * torch.randn(2 * N, 3, generator=torch.Generator().manual_seed(k))
            if k <= unlearned:
                z[torch.arange(20), y[:20]] += shift
            rows.append(z)
        _, *subjects = tables(y, y_test, some_ids(forget), *rows)
        first, *others = subjects[:unlearned]
        first.siblings = tuple(others)
        return first, subjects[unlearned:]

    return make


def run(first, references, **settings):
    return {f.name: f for f in KLoM(**settings).run(first, references, Runtime())}


def test_models_that_forgot_are_at_the_floor_and_others_above(made):
    same, apart = run(*made(0.0))["klom/forget-train"], run(*made(8.0))["klom/forget-train"]
    assert same.low <= same.reference <= same.high
    assert apart.low > apart.reference + 3 and apart.value > 8
    assert apart.value <= math.log(1e5) + 1e-9 and apart.direction == "down"
    assert apart.detail["p95"] >= apart.value and len(apart.per_sample["klom"]) == 20


def test_kept_samples_are_apart_from_forgotten_ones(made):
    found = run(*made(8.0))
    assert found["klom/retain-train"].value == pytest.approx(
        found["klom/retain-train"].reference, abs=1
    )
    assert "no whole class" in found["klom/forget-test"].reason
    assert found["klom/retain-test"].value is not None


def test_value_and_floor_count_equally_many_models(made):
    first, references = made(1.0, unlearned=30)
    found = run(first, references)["klom/forget-train"]
    assert found.detail["models"] == found.detail["oracles"] == M
    at = [margins(torch.stack([s.logits("forget-train") for s in group]), first.labels("forget-train"))
          for group in ([first, *first.siblings][:M], references[:M], references[M:])]  # fmt: skip
    np.testing.assert_allclose(found.value, klom(at[0], at[1]).mean())
    np.testing.assert_allclose(found.reference, klom(at[2], at[1]).mean())


def test_the_histograms_hold_all_samples(made):
    h = run(*made(8.0))["klom/forget-train"].detail["histogram"]
    assert sum(h["unlearned"]) == pytest.approx(1) and sum(h["floor"]) == pytest.approx(1)
    assert len(h["edges"]) == len(h["floor"]) + 1


def test_one_model_is_no_distribution(made):
    first, references = made(0.0)
    first.siblings = ()
    found = run(first, references)
    assert all(f.value is None for f in found.values())
    assert "one model is no distribution" in found["klom/forget-train"].reason


def test_too_few_models_or_samples_say_so(made):
    assert "only 4 unlearned models" in run(*made(0.0, unlearned=4))["klom/forget-train"].reason
    few = run(*made(0.0, references=15))["klom/forget-train"]
    assert "only 15 references, 20 are needed" in few.reason and few.value is None
    assert "no retrained reference" in run(made(0.0)[0], [])["klom/forget-train"].reason
    assert "only 5 samples" in run(*made(0.0, forget=5))["klom/forget-train"].reason


def test_margins_that_do_not_vary_and_broken_ones_give_no_number(made):
    assert "nothing varies" in run(*made(0.0, spread=0.0))["klom/forget-train"].reason
    first, references = made(0.0)
    first.siblings[2].model.rows.data[0] = math.nan
    assert "NaN" in run(first, references)["klom/forget-train"].reason


def test_a_stratum_narrows_all_models(made):
    first, references = made(8.0)
    ids = torch.arange(12)
    found = run(first.within(ids), [r.within(ids) for r in references])["klom/forget-train"]
    whole = run(first, references)["klom/forget-train"]
    np.testing.assert_allclose(found.per_sample["klom"], whole.per_sample["klom"][:12])


def test_compare_gives_a_methods_models_to_one_another():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    train = xp.Data((x[:60], y[:60]))
    recipe = xp.ClassifierRecipe(lambda: torch.nn.Linear(4, 2), train, epochs=1, batch_size=16)
    problem = xp.Classification(recipe(train.ids, 0), train, (x[60:], y[60:]), recipe=recipe)
    request = xp.forget(ids=list(range(15)))
    found = xp.compare(
        problem, request, ["finetune"], seeds=range(5), references=10,
        audits=[KLoM(fewest=5)], runtime=xp.Runtime(threads=1),
    )  # fmt: skip
    rows = [r for r in found.rows if r["method"] == "finetune"]
    values = [r["findings"]["klom/forget-train"]["value"] for r in rows]
    assert [r["seed"] for r in rows] == list(range(5)) and None not in values
    assert values == pytest.approx([values[0]] * 5)  # the same models, whoever asks
    before = next(r for r in found.rows if r["method"] == "original")
    assert "one model" in before["findings"]["klom/forget-train"]["reason"]
