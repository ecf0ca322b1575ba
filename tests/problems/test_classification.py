"""Classification: what fits is taken, what does not is said before any long work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from expunge.core.errors import DataError, ModelError
from expunge.problems.classification import Classification

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Function(nn.Module):
    """A model that is any function of its input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def test_the_loss_is_minus_log_of_the_true_class_probability():
    problem = Classification(nn.Linear(4, 3), (X, Y))
    batch = problem.train.fetch(problem.train.ids)
    with torch.no_grad():
        logits = problem.logits(problem.model, batch)
        loss = problem.each_loss(problem.model, batch)
    exponent = logits.double().exp()
    wanted = -(exponent / exponent.sum(1, keepdim=True)).log()[range(6), Y.tolist()]
    assert loss.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    assert problem.classes == 3


def test_mappings_are_keyword_arguments_and_outputs_may_carry_logits():
    def forward(pixels, scale):
        return SimpleNamespace(logits=pixels[:, :3] * scale[:, None], other=1)

    data = ({"pixels": X, "scale": torch.arange(6.0)}, Y)
    problem = Classification(Function(forward), data)
    problem.check()
    batch = problem.train.fetch(torch.tensor([2]))
    assert torch.equal(problem.logits(problem.model, batch), X[[2], :3] * 2)
    assert problem.classes == 3


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_any_width_can_be_trained_on(kind):
    for data in ((X, Y.to(kind)), TensorDataset(X, Y.to(kind))):
        problem = Classification(nn.Linear(4, 3), data)
        problem.check()
        batch = problem.train.fetch(problem.train.ids)
        problem.each_loss(problem.model, batch).sum().backward()


# ------------------------------------------------------------------ refusals


def check(model, data=(X, Y), **more) -> None:
    Classification(model, data, **more).check()


def test_fewer_classes_than_labels_are_refused_wherever_the_label_is():
    with pytest.raises(ModelError, match="the model has 2 classes but the data has label 2"):
        check(nn.Linear(4, 2))
    later = torch.tensor([0, 1, 0, 1, 0, 5])
    with pytest.raises(ModelError, match="has label 5"):
        check(nn.Linear(4, 3), (X, later))
    with pytest.raises(ModelError, match="has label 5"):
        check(nn.Linear(4, 3), test=(X, later))
    with pytest.raises(ModelError, match="has label 5"):
        check(nn.Linear(4, 3), valid=(X, later))
    check(nn.Linear(4, 7))


@pytest.mark.parametrize("labels", [Y.float(), Y - 1, Y[:, None], torch.nn.functional.one_hot(Y)])
def test_labels_have_to_be_class_numbers(labels):
    with pytest.raises(DataError, match="class numbers"):
        check(nn.Linear(4, 3), (X, labels))


def test_nan_logits_are_refused():
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        check(model)


def empty_error(x):
    raise ValueError


def odd_error(x):
    raise KeyError("pixel_values")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(9, 3), "does not take this data: mat1"),
        (nn.Embedding(3, 3), "does not take this data"),
        (Function(lambda x, y: x), "does not take this data"),
        (Function(empty_error), "does not take this data: ValueError"),
        (Function(odd_error), "does not take this data: 'pixel_values'"),
        (Function(lambda x: x.sum(1)), r"gave shape \(2,\)"),
        (Function(lambda x: x[:, None]), r"gave shape \(2, 1, 4\)"),
        (Function(lambda x: (x, x)), "gave .*tuple"),
    ],
)
def test_models_that_do_not_take_the_data_are_refused_in_one_sentence(model, words):
    with pytest.raises(ModelError, match=words) as caught:
        check(model)
    assert "\n" not in str(caught.value)


def test_check_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    problem = Classification(model, (X, Y))
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    problem.check()
    assert all(torch.equal(before[k], v) for k, v in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())


def test_features_are_the_outputs_of_named_layers():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    problem = Classification(model, (X, Y))
    assert problem.layers() == ["0", "2"]
    batch = problem.train.fetch(problem.train.ids)
    found = problem.features(problem.model, batch, ["1", "2"])
    assert torch.equal(found["2"], problem.logits(problem.model, batch))
    assert torch.equal(found["1"], problem.model[0](X).relu())
