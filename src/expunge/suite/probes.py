"""What the common checks ask a model of each kind: what it says of the forgotten, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.problem import Problem
from expunge.train.token_losses import answered, targets


@dataclass(frozen=True)
class Probe:
    """How one kind of model is asked.

    Attributes:
        said: of a batch of what is to be forgotten [B]: retraining is approached in it.
        known: of a batch of the rest: a share in 0 … 1 that is to stay.
        held_out: whether held-out samples can show either; facts are in their own sample alone.
    """

    said: Callable[[Problem, nn.Module, Batch], Tensor]
    known: Callable[[Problem, nn.Module, Batch], float]
    held_out: bool = True


def _class_probability(problem: Problem, model: nn.Module, batch: Batch) -> Tensor:
    """Probabilities of the class to forget."""
    return problem.capability("logits")(model, batch).softmax(1)[:, 3]


def _accuracy(problem: Problem, model: nn.Module, batch: Batch) -> float:
    found = problem.capability("logits")(model, batch).argmax(1)
    return float(found.eq(_labels(batch)).float().mean())


def _prediction(problem: Problem, model: nn.Module, batch: Batch) -> Tensor:
    return problem.capability("predict")(model, batch)


def _explained(problem: Problem, model: nn.Module, batch: Batch) -> float:
    """Share of all targets' variance that is explained."""
    error = (_prediction(problem, model, batch) - _labels(batch)).square().mean()
    assert problem.train.labels is not None
    return float(1 - error / problem.train.labels.var())


def _token_probability(problem: Problem, model: nn.Module, batch: Batch) -> Tensor:
    """Probability of a mean token of each text."""
    return (-problem.each_loss(model, batch)).exp()


def _token_accuracy(problem: Problem, model: nn.Module, batch: Batch) -> float:
    labels = _labels(batch)
    tokens, mask = targets(labels)
    said = answered(problem.capability("token_logits")(model, batch), labels)
    return float(said.argmax(1).eq(tokens[mask]).float().mean())


def _labels(batch: Batch) -> Tensor:
    assert batch.y is not None
    return batch.y


PROBES = {
    "classification": Probe(_class_probability, _accuracy),
    "regression": Probe(_prediction, _explained),
    "causal-lm": Probe(_token_probability, _token_accuracy, held_out=False),
}
"""By kind of problem."""
