"""Shadow models: halves of training and test data, log-odds, and where they are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import expunge as xp
from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime
from expunge.fleet import shadows as module
from expunge.fleet.shadows import odds_of, shadows
from expunge.train.losses import margin_each


def data(n, seed, start=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return xp.Data((x, (x[:, 0] > 0).long()), ids=torch.arange(n).flip(0) * 2 + start)


def build():
    return nn.Linear(4, 2)


def problem(recipe=None, **more):
    train, test = data(20, 0), data(12, 1)  # ids of training and test data overlap
    recipe = recipe or xp.ClassifierRecipe(build, train, epochs=2, batch_size=5)
    torch.manual_seed(0)
    return xp.Classification(build(), train, test, recipe=recipe, **more)


def test_halves_are_of_training_and_test_data_together():
    made = shadows(problem(), 6, Runtime())
    assert made.both and made.masks.shape == made.odds.shape == (6, 32)
    assert made.masks.sum(1).tolist() == [16] * 6
    assert made.masks[:, 20:].any() and not made.masks[:, 20:].all()


def test_each_is_the_recipes_model_on_its_half():
    p, runtime = problem(), Runtime(seed=3)
    made = shadows(p, 4, runtime)
    pool = p.train.joined(p.test)
    recipe = xp.ClassifierRecipe(build, pool, epochs=2, batch_size=5)
    model = recipe(pool.ids[made.masks[2]], runtime.seed_for("shadow", 2))
    both = pool.fetch(pool.ids)
    wanted = margin_each(model(both.x).double(), both.y).detach()
    torch.testing.assert_close(made.odds[2].double(), wanted, rtol=1e-4, atol=1e-4)
    # columns are found by ids, whatever their order
    ids = p.test.ids[torch.tensor([3, 0])]
    torch.testing.assert_close(
        made.odds[2][made.columns("forget-test", ids)], odds_of(p, model, p.test, runtime, ids),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    assert made.columns("retain-train", p.train.ids[[7]]).tolist() == [7]


def test_joined_data_reads_both_kinds():
    one, two = data(5, 0), data(3, 1)
    batch = two.fetch(two.ids)
    lazy = xp.Data(TensorDataset(batch.x, batch.y))
    for joined in (one.joined(two), one.joined(lazy)):
        assert joined.ids.tolist() == list(range(8))
        found = joined.fetch(torch.tensor([6, 1]))
        assert torch.equal(found.x[0], batch.x[1]) and torch.equal(found.x[1], one.fetch(one.ids).x[1])  # fmt: skip
        assert joined.labels.tolist() == [*one.labels.tolist(), *two.labels.tolist()]


def test_a_foreign_recipe_is_run_on_training_data_alone():
    train = data(20, 0)
    inner = xp.ClassifierRecipe(build, train, epochs=1, batch_size=5)
    seen = []

    def recipe(keep, seed):
        seen.append(keep)
        return inner(keep, seed)

    made = shadows(problem(recipe), 5, Runtime())
    assert not made.both and [len(k) for k in seen] == [10] * 5
    assert made.masks.shape == (5, 32) and made.masks[:, 20:].sum(1).tolist() == [6] * 5


def counted(monkeypatch):
    """Counts trainings that are asked."""
    calls, true = [], module.odds_of

    def odds(problem, model, data, *a):
        calls.append(data is problem.train)
        return true(problem, model, data, *a)

    monkeypatch.setattr(module, "odds_of", odds)
    return lambda: sum(calls)


def test_trained_once_and_kept_in_the_store(monkeypatch):
    trainings = counted(monkeypatch)
    store = xp.Store.temporary()
    p = problem()
    first = shadows(p, 4, Runtime(), store)
    assert shadows(p, 4, Runtime(), store).odds is first.odds and trainings() == 4
    again = shadows(problem(), 4, Runtime(), store)  # another process would start so
    assert trainings() == 4 and torch.equal(again.odds, first.odds) and again.both
    shadows(problem(), 4, Runtime(seed=1), store)
    assert trainings() == 8
    more = shadows(problem(), 6, Runtime(), store)  # the first four are known
    assert trainings() == 10 and torch.equal(more.odds[:4], first.odds)
    assert torch.equal(more.masks[:4], first.masks)


def test_what_was_said_before_a_stop_is_kept(monkeypatch):
    store, true, left = xp.Store.temporary(), module.odds_of, [5]

    def stopping(*a):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return true(*a)

    monkeypatch.setattr(module, "odds_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        shadows(problem(), 6, Runtime(), store)
    monkeypatch.setattr(module, "odds_of", true)
    trainings = counted(monkeypatch)
    made = shadows(problem(), 6, Runtime(), store)
    assert trainings() == 4
    torch.testing.assert_close(made.odds, shadows(problem(), 6, Runtime()).odds)


def test_what_is_missing():
    bare = xp.Classification(build(), data(20, 0), data(9, 1))
    with pytest.raises(NeedsError, match="pass recipe="):
        shadows(bare, 4, Runtime())
    p = problem()
    p.test = None
    with pytest.raises(NeedsError, match="test data"):
        shadows(p, 4, Runtime())
