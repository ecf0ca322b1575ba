"""relearn-time: the card's invariant 6, the cap, and classifiers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import expunge as xp
from expunge.audits.relearn_time import RelearnTime, median_ends
from expunge.core.hashing import hash_model
from expunge.core.view import Source

REQUEST = xp.Request(where="y > 4")
QUICK = {"batch_size": 20, "lr": 0.05, "repeats": 1, "alpha": 0.5}


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=generator)
    y = 3 + x @ torch.tensor([2.0, -1.0]) + 0.1 * torch.randn(120, generator=generator)
    train, test = xp.Data((x[:80], y[:80])), xp.Data((x[80:], y[80:]))

    def build():
        return nn.Linear(2, 1)

    recipe = xp.RegressorRecipe(build, train, epochs=60, lr=0.05, batch_size=20, step="adam")
    return xp.Regression(recipe(train.ids, 0), train, test, recipe=recipe)


def subjects():
    p = problem()
    torch.manual_seed(3)
    blank = xp.Subject(nn.Linear(2, 1), p, REQUEST, xp.Runtime())
    return xp.Subject(p.model, p, REQUEST, xp.Runtime()), blank


def run(s, references, **settings):
    found = RelearnTime(**(QUICK | settings)).run(s, references, xp.Runtime(threads=1))
    return {f.name.split("/")[1]: f for f in found}


def test_deep_regression_invariant_6_ain():
    original, blank = subjects()
    same = run(blank, [blank])
    assert same["ain"].value == 1.0
    found = run(original, [blank])
    r = found["updates"].reference
    assert r > 5 and found["updates"].value == 1
    assert found["ain"].value == 1 / r == same["ain"].original


def test_what_does_not_get_there_is_capped_and_says_so():
    original, blank = subjects()
    found = run(blank, [original], cap=3)
    assert found["updates"].value == 3 and found["updates"].detail["capped"]
    assert "not relearnt within 3 updates" in found["updates"].reason


def _counts(monkeypatch, *counts):
    left = iter(counts)
    monkeypatch.setattr(RelearnTime, "_counts", lambda *a: [next(left)])


def test_references_that_do_not_get_there_make_the_index_an_upper_bound(monkeypatch):
    original, blank = subjects()
    _counts(monkeypatch, 6, 1, 20, 12)  # the model, the original, two references
    found = run(original, [blank, blank], cap=20)
    assert found["ain"].value == 6 / 16 and found["ain"].detail["reference_capped"] == 1
    assert "1 of 2 references not relearnt within 20" in found["ain"].reason
    assert "at most this" in found["ain"].reason
    assert found["updates"].value == 6 and "at least this" in found["updates"].reason


def test_there_is_no_index_where_nobody_gets_there(monkeypatch):
    original, blank = subjects()
    _counts(monkeypatch, 20, 1, 20, 12)
    found = run(original, [blank, blank], cap=20)
    assert found["ain"].value is None and "within 20 updates" in found["ain"].reason
    # two lower bounds are not compared either
    assert found["updates"].value == 20 and found["updates"].reference is None
    assert "within 20 updates" in found["updates"].reason


def test_no_word_where_all_get_there(monkeypatch):
    original, blank = subjects()
    _counts(monkeypatch, 6, 1, 19, 12)
    assert [f.reason for f in run(original, [blank, blank], cap=20).values()] == [None, None]


def test_counts_are_medians_over_orders(monkeypatch):
    _, blank = subjects()
    counts = iter([4, 300, 5])
    orders = []

    def count(self, subject, good, runtime, order):
        orders.append(order)
        return next(counts)

    monkeypatch.setattr(RelearnTime, "_count", count)
    found = RelearnTime(repeats=3)._counts(blank, "forget-test", xp.Runtime())
    assert found == [4, 300, 5] and orders == [0, 1, 2]
    counts = iter([4, 300, 5] * 2)
    assert run(blank, [], repeats=3)["updates"].value == 5


def test_the_interval_is_that_of_a_median(monkeypatch):
    original, blank = subjects()
    left = iter([[9, 4, 6, 5, 7], [1], [10] * 5, [14] * 5])
    monkeypatch.setattr(RelearnTime, "_counts", lambda *a: next(left))
    found = run(original, [blank, blank], cap=20)
    assert (found["updates"].low, found["updates"].value, found["updates"].high) == (4, 6, 9)
    assert (found["ain"].low, found["ain"].high) == (4 / 12, 9 / 12)
    assert found["updates"].detail["counts"] == [9, 4, 6, 5, 7]
    assert found["updates"].detail["interval"] == "of the orders of the batches"
    left = iter([[9, 4, 6, 5, 7], [1], [10] * 5])
    found = run(original, [blank], cap=9)
    assert "may reach beyond" in found["updates"].detail["interval"]
    assert median_ends([3, 1, 2, 4]) == (None, None)
    random = np.random.default_rng(0)
    for n, wanted in ((5, 0.9375), (6, 0.96875), (9, 0.961), (30, 0.957)):
        ends = [median_ends(random.integers(0, 10_000, n).tolist()) for _ in range(2000)]
        held = np.mean([low <= 4999.5 <= high for low, high in ends])
        assert abs(held - wanted) < 0.02, (n, held)


def test_models_are_left_alone_and_answers_repeat():
    original, blank = subjects()
    before = [hash_model(s.model) for s in (original, blank)]
    first = run(blank, [original])["updates"].value
    blank.__dict__.pop("_relearnt")
    assert run(blank, [original])["updates"].value == first
    assert [hash_model(s.model) for s in (original, blank)] == before
    assert not any(p.requires_grad for p in blank.model.parameters())


def test_a_classifier_relearns_by_its_accuracy(digits, threes, digits_reference):
    runtime = xp.Runtime(threads=1)
    original = xp.Subject(digits.model, digits, threes, runtime)
    retrained = xp.Subject(digits_reference, digits, threes, runtime)
    found = run(original, [retrained], batch_size=256, lr=0.003)
    assert found["updates"].value == 1 < found["updates"].reference
    assert found["ain"].value < 1


def test_the_curve_ends_where_the_count_does():
    _, blank = subjects()
    found = run(blank, [blank], on="all")["updates"]
    curve = found.detail["curve"]
    assert len(curve) == found.value + 1 == found.detail["samples"] / 20 + 1
    assert curve[-1] < min(curve[:-1])
    assert found.detail["reference_curves"] == [curve]
    assert len(found.detail["original_curve"]) == 1  # good enough before any update
    again = run(blank, [blank], on="all")["updates"]
    assert again.detail["curve"] == curve


def test_what_it_relearns_from_is_a_choice(monkeypatch):
    from expunge.audits import relearn_time

    seen = []
    monkeypatch.setattr(
        relearn_time, "Source", lambda data, ids, *a: seen.append(ids) or Source(data, ids, *a)
    )
    _, blank = subjects()
    splits = blank.splits
    for on, ids in (
        ("forget", splits["forget-train"]),
        ("kept", splits["retain-train"]),
        ("all", blank.problem.train.ids),
    ):
        run(blank, [blank], on=on, cap=3)
        assert torch.equal(seen[-1], ids)
