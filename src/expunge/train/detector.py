r"""A detector of one request's prompts, made of those prompts alone: no labels, no other data.

With features \(f_l\) of a prompt at layer l, their mean \(\mu_l\), shrunk precision \(P_l\) and the bank of
unit-norm features \(b\) of the request,

\[ s_l = (f_l - \mu_l)^\top P_l\, (f_l - \mu_l) + \kappa\,(1 - \max_b \cos(f_l, b)) \]

in units of its mean over the request's prompts: higher is farther. A linear one-class SVM makes one number
\(o = w^\top s\) of the layers. \(o\) has mean \(m_1\) on the prompts it was made of, and mean \(m_2\) and
deviation \(\sigma_2\) on prompts held out:

\[
F(o) = \tfrac12 \Phi\big(\tfrac{o - m_1}{\sigma_2}\big) + \tfrac12 \Phi\big(\tfrac{o - m_2}{\sigma_2}\big), \quad
x_0 = \tfrac{m_1 + m_2}2, \quad
c = 1 - |F(o) - F(2 x_0 - o)|, \quad
w = \sigma(\zeta c - 2)
\]

w is \(\sigma(\zeta - 2)\) at \(x_0\) and \(\sigma(-2) \approx 0.12\) far away on either side.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from expunge.core.errors import DataError

FEWEST = 4
"""Prompts that a detector takes at least: three to fit each fold to, since two lie on a line; one held out."""


@dataclass(frozen=True)
class Detector:
    r"""What is kept of a request's prompts; everything else follows from it.

    Attributes:
        bank: features [n, L, D] of the prompts, float32.
        direction: w [L] of the SVM over its offset-free scores, float64.
        known: \(m_1\).
        held: \(m_2\).
        spread: \(\sigma_2\).
        kappa: κ, weight of the nearest neighbour.
        zeta: ζ, steepness of the weight.
    """

    bank: Tensor
    direction: Tensor
    known: float = 0.0
    held: float = 0.0
    spread: float = 1.0
    kappa: float = 1000.0
    zeta: float = 10.0

    @functools.cached_property
    def _mean(self) -> Tensor:
        return self.bank.double().mean(0)

    @functools.cached_property
    def _unit(self) -> Tensor:
        return normalize(self.bank.double(), dim=-1)

    @functools.cached_property
    def _precisions(self) -> list[Tensor]:
        return [precision(layer) for layer in (self.bank.double() - self._mean).unbind(1)]

    @functools.cached_property
    def _scale(self) -> Tensor:
        found = self._distances(self.bank).mean(0)
        return found.clamp(min=torch.finfo(found.dtype).tiny)

    def _distances(self, features: Tensor) -> Tensor:
        features = features.double().cpu()
        far = torch.stack(
            [
                ((f @ p) * f).sum(-1)
                for f, p in zip((features - self._mean).unbind(1), self._precisions, strict=True)
            ],
            dim=1,
        )
        cosine = torch.einsum("ild,nld->iln", normalize(features, dim=-1), self._unit)
        return far + self.kappa * (1 - cosine.max(-1).values).clamp(min=0)

    def scores(self, features: Tensor) -> Tensor:
        """Scores s [N, L] of features [N, L, D], in units of their mean over the request's prompts."""
        return self._distances(features) / self._scale

    def distance(self, features: Tensor) -> Tensor:
        """Distances o [N] of features [N, L, D]."""
        return self.scores(features) @ self.direction

    def weight(self, features: Tensor) -> Tensor:
        """Weights w [N] of features [N, L, D]: how much they are like the request's."""
        return weight(self.distance(features), self.known, self.held, self.spread, self.zeta)

    def tensors(self) -> dict[str, Tensor]:
        """The detector as tensors of whole numbers, which no change of precision touches."""
        numbers = torch.tensor(
            [self.known, self.held, self.spread, self.kappa, self.zeta], dtype=torch.float64
        )
        return {
            "bank": self.bank.contiguous().view(torch.int32),
            "direction": self.direction.view(torch.int64),
            "numbers": numbers.view(torch.int64),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Detector:
        """The detector that `tensors` was called on."""
        real = {n: t.cpu() for n, t in tensors.items()}
        return cls(
            real["bank"].view(torch.float32),
            real["direction"].view(torch.float64),
            *real["numbers"].view(torch.float64).tolist(),
        )


def weight(distance: Tensor, known: float, held: float, spread: float, zeta: float) -> Tensor:
    r"""Weights w of distances o, from \(m_1, m_2, \sigma_2\) and ζ; of any shape."""
    middle = (known + held) / 2

    def reached(o: Tensor) -> Tensor:
        phi = torch.special.ndtr
        return (phi((o - known) / spread) + phi((o - held) / spread)) / 2

    apart = (reached(distance) - reached(2 * middle - distance)).abs()
    return (zeta * (1 - apart) - 2).sigmoid()


def precision(centred: Tensor) -> Tensor:
    r"""Inverse [D, D] of \((1 - \delta) S + \delta\, \mathrm{tr}(S)/D\, I\), δ by Ledoit and Wolf.

    Args:
        centred: samples [n, D] less their mean; n may be smaller than D.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    count, size = centred.shape
    mean = float(centred.square().mean())
    if mean == 0:  # all samples are the same: nothing is known of directions
        return torch.eye(size, dtype=centred.dtype)
    delta = max(float(ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True)), 1e-6)
    covariance = (1 - delta) / count * centred.T @ centred
    covariance.diagonal().add_(delta * mean)
    return torch.linalg.inv(covariance)


def fit_detector(
    features: Tensor,
    generator: torch.Generator,
    *,
    held: float = 0.2,
    nu: float = 0.1,
    kappa: float = 1000.0,
    zeta: float = 10.0,
) -> tuple[Detector, Tensor]:
    """Make a detector of a request's prompts.

    Every prompt is held out once, in one of 1 / `held` folds, from a detector of the others.

    Args:
        features: [n, L, D], at least four.
        generator: draws the folds.
        held: share that is held out at a time.
        nu: share of prompts that the SVM may leave outside, ν.
        kappa: κ.
        zeta: ζ.

    Returns:
        The detector, and the weight [n] of each prompt while it was held out.

    Raises:
        DataError: there are too few prompts, or a feature is not finite.
    """
    features = features.float().cpu()
    count = len(features)
    if count < FEWEST:
        raise DataError(
            f"a detector needs {FEWEST} different prompts at least; the request has {count}"
        )
    if not bool(torch.isfinite(features).all()):
        raise DataError("the model has NaN or infinite hidden states on prompts of the request")
    fewest = -(-count // (count - FEWEST + 1))  # folds that leave enough to fit to
    folds = torch.randperm(count, generator=generator).chunk(
        min(count, max(2, round(1 / held), fewest))
    )
    apart = torch.empty(count, dtype=torch.float64)
    for fold in folds:
        others = torch.ones(count, dtype=torch.bool)
        others[fold] = False
        apart[fold] = _directed(features[others], nu, kappa, zeta).distance(features[fold])
    made = _directed(features, nu, kappa, zeta)
    known = float(made.distance(features).mean())
    spread = max(float(apart.std(correction=0)), 1e-3 * abs(known), 1e-12)
    made = replace(made, known=known, held=float(apart.mean()), spread=spread)
    return made, weight(apart, made.known, made.held, made.spread, zeta)


def _directed(features: Tensor, nu: float, kappa: float, zeta: float) -> Detector:
    """A detector that measures distances, not yet weights."""
    from sklearn.svm import OneClassSVM

    blank = torch.zeros(features.shape[1], dtype=torch.float64)
    made = Detector(features, blank, kappa=kappa, zeta=zeta)
    svm = OneClassSVM(kernel="linear", nu=nu).fit(made.scores(features).numpy())
    return replace(made, direction=torch.tensor(svm.coef_[0], dtype=torch.float64))
