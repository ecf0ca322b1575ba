from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from expunge.audits.divergence import Divergence, js_each, kl_each
from expunge.core.request import Request
from expunge.core.runtime import Runtime

P, Q = [0.5, 0.5], [0.9, 0.1]


def logs(*rows):
    return torch.tensor(rows).double().log()


def test_known_pairs():
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(kl_each(logs(P), logs(Q))) == pytest.approx(kl)
    m = [0.7, 0.3]
    js = sum(0.5 * a * math.log(a / c) for p in (P, Q) for a, c in zip(p, m, strict=True))
    assert float(js_each(logs(P), logs(Q))) == pytest.approx(js)


def test_equal_scipys_on_random_outputs():
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(20, 5, generator=generator).double() for _ in range(2))
    p, q = a.softmax(1).numpy(), b.softmax(1).numpy()
    assert np.allclose(kl_each(a, b), entropy(p, q, axis=1))
    assert np.allclose(js_each(a, b), jensenshannon(p, q, axis=1) ** 2)
    assert np.allclose(js_each(a, b), js_each(b, a))
    assert np.allclose(js_each(a, a + 7), 0)  # a shift of logits is no change


def test_saturated_outputs_stay_finite_and_within_bounds():
    a, b = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert float(js_each(a, b)) == pytest.approx(math.log(2))
    assert float(kl_each(a, b)) == pytest.approx(2e4)
    assert float(js_each(a, a)) == 0 and float(kl_each(a, a)) == 0


@pytest.fixture
def subjects(tables):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(30, 3, generator=generator)
    near = [base + 0.1 * torch.randn(30, 3, generator=generator) for _ in range(2)]
    return tables(
        [0, 1, 2] * 6, [0, 1, 2] * 4, Request(label=2), 5 * torch.eye(3).repeat(10, 1), base, *near
    )


def test_findings_are_means_over_references(subjects, by_name):
    _, released, first, second = subjects
    found = by_name(Divergence().run(released, [first, second], Runtime()))
    assert set(found) == {
        f"divergence/{k}-{s}" for k in ("js", "kl") for s in ("forget-train", "forget-test", "retain-test")
    }  # fmt: skip
    f = found["divergence/kl-forget-train"]
    p, a, b = (
        s.logits("forget-train").double().softmax(1).numpy() for s in (released, first, second)
    )
    each = (entropy(a, p, axis=1) + entropy(b, p, axis=1)) / 2
    assert np.allclose(f.per_sample["divergence"], each, atol=1e-7)
    assert f.value == pytest.approx(each.mean(), abs=1e-7) and f.direction == "down"
    among = [entropy(a, b, axis=1).mean(), entropy(b, a, axis=1).mean()]
    assert f.reference == pytest.approx(np.mean(among), abs=1e-7)
    assert f.floor == pytest.approx(max(among), abs=1e-7)
    assert f.original > 10 * f.value
    assert f.low < f.value < f.high


def test_a_reference_is_as_far_as_the_floor(subjects, by_name):
    _, _, first, second = subjects
    found = by_name(Divergence().run(second, [first], Runtime()))
    f = found["divergence/js-forget-train"]
    both = by_name(Divergence().run(second, [first, second], Runtime()))
    assert both["divergence/js-forget-train"].reference == pytest.approx(f.value)
    assert f.reference is None and "one reference" in f.reason


def test_reasons(subjects, tables, by_name, some_ids):
    found = by_name(Divergence().run(subjects[1], [], Runtime()))
    assert {f.reason for f in found.values()} == {"no retrained reference to compare with"}
    a, b = tables(
        [0, 1] * 5, [0, 1], some_ids(3), torch.eye(2).repeat(6, 1), torch.eye(2).repeat(6, 1)
    )
    found = by_name(Divergence().run(a, [b], Runtime()))
    assert "no whole class" in found["divergence/js-forget-test"].reason
    broken = torch.full((12, 2), torch.inf)
    a, b = tables([0, 1] * 5, [0, 1], some_ids(3), torch.eye(2).repeat(6, 1), broken)
    found = by_name(Divergence().run(b, [a], Runtime()))
    assert found["divergence/js-forget-train"].value is None
    assert "infinite" in found["divergence/js-forget-train"].reason
