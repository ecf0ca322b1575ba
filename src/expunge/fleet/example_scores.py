r"""Scores of single samples: what one network says about how hard each of them is.

With \(p = \mathrm{softmax}(f(x))\) and one-hot \(y\):

- `el2n` \(= \|p - y\|_2 \in [0, \sqrt 2]\), and `l1` \(= \|p - y\|_1 \in [0, 2]\);
- `max-margin` \(= \max_{c \ne y} p_c - p_y\) and `sum-margin` \(= \sum_{c \ne y}(p_c - p_y)\);
- `grand` \(= \|\nabla_\theta \ell(f(x), y)\|_2\) over all parameters, in the units of the loss.

Higher is harder. `forgetting` counts, over a training, how often a sample goes from right to wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from expunge.core.data import Batch
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.curvature.norms import gradient_norms


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Length [n] of the error vector, 0 … √2, from logits [n, C]."""
    return _errors(logits, labels).norm(dim=1)


def l1(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum [n] of the absolute errors, 0 … 2."""
    return _errors(logits, labels).abs().sum(1)


def max_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest probability of a wrong class minus that of the right one [n], −1 … 1."""
    p = logits.double().softmax(1)
    right = one_hot(labels, p.shape[1]).bool()
    return p.masked_fill(right, 0.0).amax(1) - p[right]


def sum_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the wrong classes of their margin over the right one [n], 1 − C … 1."""
    p = logits.double().softmax(1)
    right = p.gather(1, labels[:, None])
    return (p - right).sum(1)  # the right class adds nothing


def _errors(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.double().softmax(1)
    return p - one_hot(labels, p.shape[1])


OF_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "el2n": el2n,
    "l1": l1,
    "max-margin": max_margin,
    "sum-margin": sum_margin,
}
"""Scores that one forward pass gives."""


def score_model(
    score: str, problem: Problem, model: nn.Module, ids: Tensor, runtime: Runtime
) -> Tensor:
    """Score training samples by one network in eval mode.

    Args:
        score: `grand` or a name in `OF_LOGITS`.
        problem: gives data, logits and loss.
        model: the network.
        ids: the samples [n].
        runtime: device and counters.

    Returns:
        Scores [n], float64 on CPU.
    """
    model = model.to(runtime.device).eval()
    batches = (batch.to(runtime.device) for batch in problem.train.batches(256, ids))
    runtime.cost.samples += len(ids)
    if score == "grand":
        runtime.cost.gradients += len(ids)
        return gradient_norms(model, problem.each_loss, batches).double()
    compute, measure = problem.capability("logits"), OF_LOGITS[score]
    with torch.no_grad():
        parts = [measure(compute(model, b), b.y).cpu() for b in batches if b.y is not None]
    return torch.cat(parts)


class ForgettingEvents:
    """Counts how often samples go from right to wrong between two looks at them.

    A sample that is not looked at keeps its state. One that was never right counts as infinitely
    hard; one that is always right as 0.
    """

    def __init__(self, ids: Tensor) -> None:
        """Start with no sample known to be right.

        Args:
            ids: the samples [n]; counts come in this order.
        """
        self._at = {int(i): place for place, i in enumerate(ids.tolist())}
        self._right = torch.zeros(len(ids), dtype=torch.bool)
        self._ever = torch.zeros(len(ids), dtype=torch.bool)
        self._events = torch.zeros(len(ids), dtype=torch.float64)

    def see(self, ids: Tensor, right: Tensor) -> None:
        """Note for some samples [B] whether they are right [B] now."""
        at = torch.tensor([self._at[int(i)] for i in ids.tolist()], dtype=torch.long)
        now = right.cpu().bool()
        self._events[at] += (self._right[at] & ~now).double()
        self._right[at] = now
        self._ever[at] |= now

    def watch(self, batch: Batch, output: Any) -> None:
        """Look at a batch of a training: in train mode, augmented, before the step."""
        assert batch.y is not None
        logits = getattr(output, "logits", output).detach()
        self.see(batch.ids, logits.argmax(1) == batch.y)

    def counts(self) -> Tensor:
        """Events of each sample [n], ∞ where it was never right."""
        return self._events.masked_fill(~self._ever, torch.inf)
