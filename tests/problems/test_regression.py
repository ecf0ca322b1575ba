"""Regression: outputs, losses, checks, and requests for a range of targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import DataError, ModelError, SettingError
from expunge.core.request import Request
from expunge.core.runtime import Runtime

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.linspace(0, 5.5, 12)


def test_columns_and_vectors_give_the_same_loss():
    """[B, 1] against targets [B] would broadcast to B × B."""
    torch.manual_seed(0)
    column = nn.Linear(3, 1)
    flat = nn.Sequential(column, nn.Flatten(0))
    a, b = (xp.Regression(m, (X, Y), loss="l1") for m in (column, flat))
    batch = a.train.fetch(a.train.ids)
    assert a.predict(a.model, batch).shape == (12,)
    wanted = (a.model(X).squeeze(1) - Y).abs()
    torch.testing.assert_close(a.each_loss(a.model, batch), wanted)
    torch.testing.assert_close(b.each_loss(b.model, batch), wanted)


@pytest.mark.parametrize(("loss", "wanted"), [("l1", [2.0, 3.0]), ("mse", [4.0, 9.0]), ("quantile(0.9)", [0.2, 2.7])])  # fmt: skip
def test_losses(loss, wanted):
    p = xp.Regression(nn.Linear(3, 1), (X, Y), loss=loss)
    found = p.loss_between(torch.tensor([5.0, 1.0]), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("loss", ["mae", "quantile(1.0)", "quantile(0)", "quantile", 2])
def test_unknown_losses_are_refused(loss):
    with pytest.raises(SettingError, match=r"quantile\(q\)"):
        xp.Regression(nn.Linear(3, 1), (X, Y), loss=loss)


def test_the_loss_is_part_of_the_fingerprint():
    a, b = (xp.Regression(nn.Linear(3, 1), (X, Y), loss=name) for name in ("l1", "mse"))
    assert a.fingerprint()["loss"] != b.fingerprint()["loss"]


def test_check_says_what_is_wrong():
    with pytest.raises(ModelError, match=r"one number a sample.*\(2, 4\)"):
        xp.Regression(nn.Linear(3, 4), (X, Y)).check()
    with pytest.raises(DataError, match=r"\[N\].*\(12, 1\)"):
        xp.Regression(nn.Linear(3, 1), (X, Y[:, None])).check()
    with pytest.raises(DataError, match="NaN"):
        xp.Regression(nn.Linear(3, 1), (X, Y / torch.tensor(0.0)))
    with pytest.raises(ModelError, match="does not take"):
        xp.Regression(nn.Linear(5, 1), (X, Y)).check()
    broken = nn.Linear(3, 1)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        xp.Regression(broken, (X, Y)).check()
    xp.Regression(nn.Linear(3, 1), (X, Y)).check()


def test_a_range_of_targets_splits_training_and_test_data():
    p = xp.Regression(nn.Linear(3, 1), (X, Y), (X[:4], torch.tensor([0.5, 1.5, 2.5, 9.0])))
    request = xp.forget(where="1 < y <= 2.5")
    splits = {k: v.tolist() for k, v in p.split(request).items()}
    assert splits["forget-train"] == [3, 4, 5]
    assert splits["forget-test"] == [1, 2] and splits["retain-test"] == [0, 3]
    assert Request.from_dict(request.to_dict()).key == request.key


def test_taps_are_not_flattened_and_come_with_the_prediction():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    p = xp.Regression(net, (torch.randn(5, 1, 4, 4), Y[:5]))
    batch = p.train.fetch(p.train.ids)
    predicted, found = p.tapped(p.model, batch, ["0"])
    assert found["0"].shape == (5, 2, 2, 2)
    assert torch.equal(predicted, p.predict(p.model, batch))
    assert p.features(p.model, batch, ["0"])["0"].shape == (5, 8)
    assert p.penultimate(p.model, batch).shape == (5, 8)
    assert p.layers() == ["0", "3"]


def test_the_recipe_fits_a_line_and_has_a_key_of_its_own():
    data = xp.Data((X, X @ torch.tensor([1.0, -2.0, 0.5]) + 3))

    def recipe(loss):
        return xp.RegressorRecipe(
            lambda: nn.Linear(3, 1), data, epochs=200, lr=0.1, batch_size=6, step="adam",
            weight_decay=0.0, loss=loss,
        )  # fmt: skip

    p = xp.Regression(recipe("l1")(data.ids, 0), data)
    assert float(p.each_loss(p.model, data.fetch(data.ids)).max().detach()) < 0.05
    assert recipe("l1").key() != recipe("mse").key()
    assert recipe("l1").settings()["loss"] == "l1"


def test_methods_that_need_classes_say_so():
    p = xp.Regression(nn.Linear(3, 1), (X, Y))
    with pytest.raises(xp.UserError, match="needs classes to choose from"):
        xp.unlearn(p, xp.forget(where="y < 2"), xp.methods.RandomLabel(epochs=1))


def test_general_methods_run():
    p = xp.Regression(nn.Linear(3, 1), (X, Y))
    outcome = xp.unlearn(
        p, xp.forget(where="y < 2"), xp.methods.FineTune(epochs=1), runtime=Runtime()
    )
    assert outcome.change.tensors
