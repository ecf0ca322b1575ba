"""Problem: functions instead of subclasses, splits, and the original that never changes."""

from __future__ import annotations

import datetime

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from expunge.core import data as data_module
from expunge.core.audit import Subject
from expunge.core.data import Data
from expunge.core.errors import DataError, NeedsError, UserError
from expunge.core.hashing import hash_model
from expunge.core.needs import Needs
from expunge.core.problem import Problem, run_recipe
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification


def squared(model, batch):
    return mse_loss(model(batch.x).squeeze(1), batch.y, reduction="none")


@pytest.fixture
def regression() -> Problem:
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    return Problem.of(
        nn.Linear(3, 1),
        (x, x.sum(1)),
        each_loss=squared,
        features=lambda model, batch: batch.x,
        test=(x[:2], x[:2].sum(1)),
        name="sums",
    )


@pytest.fixture
def classified() -> Classification:
    torch.manual_seed(0)
    train = Data((torch.randn(9, 2), [0, 1, 2] * 3), ids=range(10, 19))
    test = Data((torch.randn(6, 2), [2, 1, 0, 2, 1, 0]), ids=[5, 4, 3, 2, 1, 0])
    return Classification(nn.Linear(2, 3), train, test)


# ------------------------------------------------------------------ functions


def test_functions_are_enough(regression):
    batch = regression.train.fetch(regression.train.ids)
    wanted = (regression.model(batch.x).squeeze(1) - batch.y) ** 2
    assert torch.allclose(regression.each_loss(regression.model, batch), wanted)
    assert regression.can("features")
    assert regression.can("each_loss")
    assert not regression.can("logits")
    assert torch.equal(regression.capability("features")(regression.model, batch), batch.x)
    assert (regression.name, len(regression.test)) == ("sums", 2)
    regression.check()


def test_a_missing_capability_is_named(regression):
    with pytest.raises(NeedsError, match="does not offer 'logits'; pass logits="):
        regression.capability("logits")
    needs = Needs(capabilities=frozenset({"logits"}))
    with pytest.raises(NeedsError, match="ssd needs 'logits'"):
        needs.check("ssd", regression)


def test_a_problem_without_a_loss_says_so():
    problem = Problem(nn.Linear(1, 1), torch.zeros(3, 1))
    with pytest.raises(NeedsError, match="no each_loss"):
        problem.each_loss(problem.model, problem.train.fetch(problem.train.ids))


def test_a_misspelt_argument_is_no_capability():
    with pytest.raises(UserError, match="no argument 'tset'"):
        Problem.of(nn.Linear(1, 1), torch.zeros(3, 1), each_loss=squared, tset=torch.zeros(3, 1))


def test_functions_given_go_before_those_of_a_kind():
    def halved(model, batch):
        return torch.full((len(batch),), 0.5)

    def constant(model, batch):
        return torch.ones(len(batch), 3)

    data = (torch.zeros(4, 2), [0, 1, 2, 0])
    problem = Classification.of(nn.Linear(2, 5), data, each_loss=halved, logits=constant)
    batch = problem.train.fetch(problem.train.ids)
    assert problem.each_loss(problem.model, batch).tolist() == [0.5] * 4
    assert problem.logits(problem.model, batch).shape == (4, 3)
    assert problem.classes == 3
    problem.check()


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: model(batch.x).mean(),
        lambda model, batch: model(batch.x),
        lambda model, batch: model(batch.x).squeeze(1) * float("nan"),
    ],
    ids=["mean", "column", "nan"],
)
def test_check_wants_one_finite_loss_a_sample(loss):
    problem = Problem.of(nn.Linear(3, 1), (torch.randn(4, 3), [0.0] * 4), each_loss=loss)
    with pytest.raises(DataError, match="one finite number a sample"):
        problem.check()


def test_needs_are_checked_before_any_work(regression):
    unlabelled = Problem.of(nn.Linear(3, 1), torch.randn(4, 3), each_loss=squared)
    with pytest.raises(NeedsError, match="m needs labels and the training data has none"):
        Needs(labels="retain").check("m", unlabelled)
    with pytest.raises(NeedsError, match="pass recipe="):
        Needs(recipe=True).check("m", regression)
    with pytest.raises(NeedsError, match="pass valid="):
        Needs(validation=True).check("m", regression)
    Needs(forget=True, retain=True, labels="all", original=True).check("m", regression)


# ------------------------------------------------------------------ the model


def test_the_model_is_copied_and_put_in_eval_mode():
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout()).train()
    before = hash_model(model)
    problem = Classification(model, (torch.zeros(3, 2), [0, 1, 2]))
    with torch.no_grad():
        problem.model[0].weight += 1
    assert hash_model(model) == before
    assert model.training
    assert not problem.model.training


def test_a_model_frozen_for_inference_can_be_trained_but_a_frozen_part_stays_so():
    data = (torch.zeros(3, 2), [0, 1, 2])
    frozen = nn.Linear(2, 3).requires_grad_(False)
    assert all(p.requires_grad for p in Classification(frozen, data).model.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    part = nn.Linear(2, 3)
    part.bias.requires_grad_(False)
    assert not Classification(part, data).model.bias.requires_grad


def test_roles():
    problem = Classification(
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)),
        (torch.zeros(3, 2), [0, 1, 2]),
        roles={"first": ["0"]},
    )
    assert problem.role("last layer") == ["2"]
    assert problem.role("first") == ["0"]
    with pytest.raises(NeedsError, match=r"no module of this model is known as 'attention'"):
        problem.role("attention")


# ------------------------------------------------------------------ splits


def lists(splits):
    return {name: ids.tolist() for name, ids in splits.items()}


def test_forgetting_a_class_splits_the_test_data_too(classified):
    assert lists(classified.split(Request(label=2))) == {
        "forget-train": [12, 15, 18],
        "retain-train": [10, 11, 13, 14, 16, 17],
        "forget-test": [2, 5],
        "retain-test": [0, 1, 3, 4],
    }
    assert lists(classified.split(Request(label=(2, 0))))["forget-test"] == [0, 2, 3, 5]


@pytest.mark.parametrize("request_", [Request(ids=(12, 10)), Request(where="id < 13")])
def test_forgetting_samples_leaves_the_test_data_whole(classified, request_):
    splits = lists(classified.split(request_))
    assert splits["forget-test"] == []
    assert splits["retain-test"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("where", ["label == 2", "y == 2", "not (0 <= y < 2)"])
def test_a_condition_on_labels_alone_splits_the_test_data_too(classified, where):
    asked, named = classified.split(Request(where=where)), classified.split(Request(label=2))
    assert lists(asked) == lists(named)


@pytest.mark.parametrize("where", ["label == 2 and id < 17", "y == 2 or id == 10"])
def test_a_condition_on_more_than_labels_leaves_the_test_data_whole(classified, where):
    assert lists(classified.split(Request(where=where)))["forget-test"] == []


def test_a_column_called_y_is_not_the_label():
    x = torch.zeros(4, 2)
    train = Data((x, [0, 1, 0, 1]), columns={"y": [5, 6, 7, 8]})
    test = Data((x, [0, 1, 0, 1]), columns={"y": [5, 6, 7, 8]})
    splits = lists(Classification(nn.Linear(2, 2), train, test).split(Request(where="y >= 7")))
    assert (splits["forget-train"], splits["forget-test"]) == ([2, 3], [])


def test_a_class_that_the_test_data_lacks_or_consists_of():
    x = torch.zeros(6, 2)
    lacking = Classification(nn.Linear(2, 3), (x, [0, 1, 2] * 2), (x[:2], [0, 1]))
    splits = lists(lacking.split(Request(label=(1, 2))))
    assert (splits["forget-test"], splits["retain-test"]) == ([1], [0])
    assert lists(lacking.split(Request(label=2)))["forget-test"] == []
    consisting = Classification(nn.Linear(2, 3), (x, [0, 1, 2] * 2), (x[:2], [2, 2]))
    splits = lists(consisting.split(Request(label=2)))
    assert (splits["forget-test"], splits["retain-test"]) == ([0, 1], [])


def test_without_test_data_there_are_two_splits():
    problem = Classification(nn.Linear(2, 3), (torch.zeros(3, 2), [0, 1, 2]))
    assert set(problem.split(Request(label=2))) == {"forget-train", "retain-train"}


# ------------------------------------------------------------------ keys


def test_the_fingerprint_covers_model_and_data(classified):
    base = classified.fingerprint()
    other = Classification(nn.Linear(2, 3), classified.train, classified.test).fingerprint()
    assert {k for k in base if base[k] != other[k]} == {"model"}
    assert base["valid"] is None


def test_recipes_have_keys_by_their_text(classified):
    with pytest.raises(NeedsError, match="pass recipe="):
        classified.recipe_key()

    def first(keep_ids, seed):
        return nn.Linear(2, 3)

    def second(keep_ids, seed):
        return nn.Linear(2, 3, bias=True)

    keys = set()
    for recipe in (first, second):
        classified.recipe = recipe
        keys.add(classified.recipe_key())
        assert classified.recipe_key() in keys
    assert len(keys) == 2


# ------------------------------------------------------------------ fingerprints


def changed(one, other):
    a, b = one.fingerprint(), other.fingerprint()
    return {name for name in a if a[name] != b[name]}


def test_frozen_parameters_and_shared_ones_are_other_problems():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), (torch.randn(4, 2), [0, 1, 0, 1])
    whole = Classification(model, data)
    model[0].weight.requires_grad_(False)
    assert changed(whole, Classification(model, data)) == {"trained parameters"}
    assert not changed(Classification(model, data), Classification(model.train(), data))
    frozen = nn.Sequential(*model)
    frozen.requires_grad_(False)  # for inference, not by design: all of it may train
    assert not changed(whole, Classification(frozen, data))
    alike = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    alike[1].load_state_dict(alike[0].state_dict())
    tied = nn.Sequential(alike[0], nn.Linear(2, 2))
    tied[1].weight, tied[1].bias = tied[0].weight, tied[0].bias
    assert changed(Classification(alike, data), Classification(tied, data)) == {
        "trained parameters"
    }


def test_an_attribute_of_a_module_is_another_problem(regression):
    other = regression.about(regression.model)
    other.model.temperature = 2.0
    assert changed(regression, other) == {"attributes"}


def test_a_model_that_counts_its_calls_stays_the_same_problem(regression):
    before = regression.fingerprint()
    regression.model.calls = 3
    assert regression.fingerprint() == before


def test_columns_and_names_are_part_of_a_problem_s_data(classified):
    def made(**more):
        test = Data((classified.test.fetch(classified.test.ids).x, classified.test.labels), ids=classified.test.ids, **more)  # fmt: skip
        return Classification(classified.model, classified.train, test)

    marked = made(columns={"unseen": [1, 1, 0, 0, 0, 0]})
    assert not changed(marked, made(columns={"unseen": [1, 1, 0, 0, 0, 0]}))
    for other in (made(columns={"unseen": [1, 0, 1, 0, 0, 0]}), made(), made(names=list("abcdef"))):
        assert changed(marked, other) == {"columns"}


def test_a_problem_made_from_another_has_an_original_of_its_own(classified):
    request = Request(label=(0,))
    first = Subject(classified.model, classified, request, Runtime()).original()
    kept = {"weight": torch.tensor([[True, False], [True, True], [False, True]])}
    sparse = classified.pruned(classified.model, kept, recipe=None, name="sparse", source={})
    moved = nn.Linear(2, 3)
    for other in (sparse, classified.about(moved)):
        found = Subject(other.model, other, request, Runtime()).original()
        assert hash_model(found.model) == hash_model(other.model) != hash_model(first.model)


def test_columns_of_days_have_a_hash_that_is_taken_once(classified, monkeypatch):
    days = [datetime.date(2024, 1, d) for d in range(1, 7)]
    inputs = classified.test.fetch(classified.test.ids).x

    def made(days):
        return Classification(classified.model, classified.train, Data(inputs, columns={"day": days}))  # fmt: skip

    one = made(days)
    assert changed(one, made(days[::-1])) == {"columns"} and not changed(one, made(days))
    monkeypatch.setattr(data_module, "hash_array", None)
    assert one.fingerprint() == one.fingerprint()


def test_a_recipe_that_does_not_seed_gives_another_model_for_another_seed(classified):
    """Two references that are bit for bit alike would show a noise floor of 0."""

    def unseeded(keep, seed):
        return nn.Linear(2, 3)

    before = torch.random.get_rng_state()
    made = [hash_model(run_recipe(unseeded, classified.train.ids, s, Runtime())) for s in (1, 2, 1)]
    assert made[0] == made[2] != made[1]
    assert torch.equal(torch.random.get_rng_state(), before)
