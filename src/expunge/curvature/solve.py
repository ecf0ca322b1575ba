r"""Linear effects from random subsets: \(y_k \approx b + \sum_i A_{ki} \beta_i\), many outputs at once.

A solver is anything that is called with masks \(A \in \{0,1\}^{K \times n}\) (who was in training k) and
outputs \(Y \in R^{K \times m}\) (what came out) and returns `Effects`. Three come with the library; a
learned one is one more row of `SOLVERS`.

| name | estimate |
|---|---|
| `ridge` | \(\min \|A_c\beta - y_c\|^2 + \lambda\|\beta\|_2^2\), one factorisation for all m outputs |
| `lasso` | \(\min \|A_c\beta - y_c\|^2 + \lambda\|\beta\|_1\), one output at a time |
| `difference` | mean of y with sample i less mean of y without it |

The index c stands for centred over trainings, which leaves the intercept without a penalty.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from expunge.core.errors import DataError, ExpungeError

COLUMNS = 4096
"""Outputs that are solved for at a time; bounds the memory taken in double precision."""

HELD_OUT = 0.2
"""Share of the trainings, the last ones, on which λ is chosen."""


@dataclass(frozen=True)
class Effects:
    r"""What adding each sample does to each output.

    Attributes:
        values: \(\beta\) [n, m], in units of the output, of its dtype.
        intercept: b [m], the output of a training on no sample (extrapolated).
        details: λ in force and the share of variance explained on held-out trainings, where known.
    """

    values: Tensor
    intercept: Tensor
    details: dict[str, Any] = field(default_factory=dict)

    def predict(self, masks: Tensor) -> Tensor:
        """Outputs [K, m] of trainings on the subsets `masks` [K, n]."""
        return masks.to(self.values.dtype) @ self.values + self.intercept


class Solver(Protocol):
    """Estimates effects from masks [K, n] and outputs [K, m]."""

    def __call__(self, masks: Tensor, outputs: Tensor) -> Effects:
        """Return the effects [n, m]."""


@dataclass(frozen=True)
class Ridge:
    """Least squares with an L2 penalty.

    Attributes:
        lam: λ, or None to choose it on held-out trainings.
    """

    lam: float | None = None

    def __call__(self, masks: Tensor, outputs: Tensor) -> Effects:
        """Factorise once, then solve for the outputs in groups of columns."""
        check(masks, outputs)
        details: dict[str, Any] = {}
        lam = self.lam
        if lam is None:
            lam, details["explained"] = self._choose(masks, outputs)
        spectrum = _Spectrum(masks)
        parts = [spectrum.solve(y, lam) for y in outputs.split(COLUMNS, dim=1)]
        values = torch.cat(parts, dim=1)
        return _effects(masks, outputs, values, details | {"lam": lam})

    @staticmethod
    def _choose(masks: Tensor, outputs: Tensor) -> tuple[float, float]:
        """The λ that predicts held-out trainings best, and the variance it explains there."""
        fit, held = _parts(len(masks))
        spectrum = _Spectrum(masks[fit])
        y = _thinned(outputs, COLUMNS).double()
        best = (0.0, -float("inf"))
        for power in range(-6, 7):
            lam = spectrum.mean * 10 ** (power / 2)
            found = _effects(masks[fit], y[fit], spectrum.solve(y[fit], lam), {})
            share = explained(found, masks[held], y[held], y[fit].mean(0))
            best = max(best, (lam, share), key=lambda b: b[1])
        return best


@dataclass(frozen=True)
class Lasso:
    """Least squares with an L1 penalty, by scikit-learn's coordinate descent.

    Attributes:
        lam: λ, or None to choose it on held-out trainings.
        steps: most passes of the descent; outputs that are not done by then are counted.
    """

    lam: float | None = None
    steps: int = 2000

    def __call__(self, masks: Tensor, outputs: Tensor) -> Effects:
        """Solve for each output by itself."""
        check(masks, outputs)
        details: dict[str, Any] = {}
        lam = self.lam
        if lam is None:
            lam, details["explained"] = self._choose(masks, outputs)
        values, unfinished = self._solve(masks, outputs, lam)
        if unfinished:
            details["unfinished"] = unfinished
        return _effects(masks, outputs, values, details | {"lam": lam})

    def _choose(self, masks: Tensor, outputs: Tensor) -> tuple[float, float]:
        fit, held = _parts(len(masks))
        y = _thinned(outputs, 32).double()
        a = masks[fit].double()
        # above twice this λ every coefficient is zero
        largest = float(((a - a.mean(0)).T @ (y[fit] - y[fit].mean(0))).abs().max()) * 2
        best = (0.0, -float("inf"))
        for power in range(1, 9):
            lam = largest * 10 ** (-power / 2)
            values, _ = self._solve(masks[fit], y[fit], lam)
            found = _effects(masks[fit], y[fit], values, {})
            share = explained(found, masks[held], y[held], y[fit].mean(0))
            best = max(best, (lam, share), key=lambda b: b[1])
        return best

    def _solve(self, masks: Tensor, outputs: Tensor, lam: float) -> tuple[Tensor, int]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import Lasso as Descent

        # scikit-learn divides the squares by 2K
        model = Descent(alpha=lam / (2 * len(masks)), max_iter=self.steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(masks.double().numpy(), outputs.double().numpy())
        values = torch.from_numpy(model.coef_).reshape(outputs.shape[1], -1).T
        return values, sum(issubclass(w.category, ConvergenceWarning) for w in caught)


@dataclass(frozen=True)
class Difference:
    """Difference of means: nothing is solved, so samples that went together share their effects."""

    def __call__(self, masks: Tensor, outputs: Tensor) -> Effects:
        """Mean with less mean without.

        Raises:
            DataError: a sample was in all trainings or in none.
        """
        check(masks, outputs)
        a = masks.double()
        inside = a.sum(0)
        outside = len(a) - inside
        if float(torch.minimum(inside, outside).min()) < 1:
            raise DataError(
                "a sample was in every training or in none, so its effect is unknown; train more models"
            )
        parts = []
        for y in outputs.split(COLUMNS, dim=1):
            total, within = y.double().sum(0), a.T @ y.double()
            parts.append(within / inside[:, None] - (total - within) / outside[:, None])
        return _effects(masks, outputs, torch.cat(parts, dim=1), {})


SOLVERS: dict[str, Callable[[float | None], Solver]] = {
    "ridge": Ridge,
    "lasso": Lasso,
    "difference": lambda lam: Difference(),
}
"""Makers of solvers by name; each takes λ, or None if it is to choose one."""


def explained(effects: Effects, masks: Tensor, outputs: Tensor, typical: Tensor) -> float:
    """Share of the spread of held-out outputs that is predicted, all outputs together.

    Args:
        effects: from other trainings.
        masks: held-out masks [K, n].
        outputs: what came out [K, m].
        typical: mean output [m] of the other trainings; predicting it explains nothing, 0.

    Returns:
        At most 1; below 0 if the effects predict worse than the mean.
    """
    outputs = outputs.to(effects.values.dtype)
    rest = (outputs - effects.predict(masks)).square().sum()
    return 1 - float(rest / (outputs - typical.to(outputs)).square().sum().clamp_min(1e-30))


class _Spectrum:
    r"""Eigenvalues of the smaller of \(A_c^T A_c\) and \(A_c A_c^T\); good for every λ and output."""

    def __init__(self, masks: Tensor) -> None:
        a = masks.double()
        self._a = a - a.mean(0)
        self._wide = len(a) < a.shape[1]
        gram = self._a @ self._a.T if self._wide else self._a.T @ self._a
        self._values, self._vectors = torch.linalg.eigh(gram)
        floor = self._values.max().clamp_min(0) * max(a.shape) * torch.finfo(torch.float64).eps
        # subsets of one size say nothing about a shift of all effects: such directions stay zero
        self._seen = self._values > floor
        self.mean = float(self._values[self._seen].mean()) if bool(self._seen.any()) else 1.0

    def solve(self, outputs: Tensor, lam: float) -> Tensor:
        """Effects [n, m] of outputs [K, m]."""
        y = outputs.double()
        y = y - y.mean(0)
        inverse = torch.where(self._seen, 1 / (self._values + lam).clamp_min(1e-300), 0.0)
        right = self._vectors.T @ (y if self._wide else self._a.T @ y)
        solved = self._vectors @ (inverse[:, None] * right)
        return self._a.T @ solved if self._wide else solved


def check(masks: Tensor, outputs: Tensor) -> None:
    """Refuse what no solver can use.

    Raises:
        DataError: rows disagree, or there are too few.
        ExpungeError: an output is NaN or infinite.
    """
    if masks.ndim != 2 or outputs.ndim != 2 or len(masks) != len(outputs):
        raise DataError("a solver takes masks [K, n] and outputs [K, m] with the same K")
    if len(masks) < 2:
        raise DataError("effects need at least two trainings on different subsets")
    if not bool(torch.isfinite(outputs).all()):
        raise ExpungeError("a model trained on a subset gives NaN or infinite outputs")


def _effects(masks: Tensor, outputs: Tensor, values: Tensor, details: dict[str, Any]) -> Effects:
    dtype = outputs.dtype if outputs.dtype == torch.float64 else torch.float32
    intercept = outputs.double().mean(0) - masks.double().mean(0) @ values
    return Effects(values.to(dtype), intercept.to(dtype), details)


def _parts(count: int) -> Iterator[slice]:
    """Trainings to fit on and trainings to choose λ on; masks are random, so any split will do."""
    kept = max(1, count - max(1, round(HELD_OUT * count)))
    return iter((slice(0, kept), slice(kept, count)))


def _thinned(outputs: Tensor, most: int) -> Tensor:
    """At most `most` columns, evenly spaced."""
    return outputs[:, :: -(-outputs.shape[1] // most)]
