r"""Densities of scores: Gaussian kernels with a cross-validated bandwidth.

\[ p(x) = (1-\varepsilon)\,\frac1n \sum_j \prod_d \mathcal N(x_d;\, x_{jd}, (h\,s_d)^2) + \varepsilon / V \]

with \(s_d\) the standard deviation of feature d, one factor h for all features, \(\varepsilon = 1/(n+1)\)
and V the volume of the box that the samples span: a score that no sample is near is evidence of little, and
without that floor a kernel's tail would make it evidence of anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from expunge.core.errors import DataError

Array = npt.NDArray[np.float64]

FACTORS = np.geomspace(0.06, 1.0, 13)
"""Bandwidths that are tried, in standard deviations."""
NARROWER = 0.5
"""Of the best bandwidth: at that one a narrow density is smoothed too wide and takes samples off others."""
FOLDS = 5
CHUNK = 2000
"""Samples whose kernels are held at a time."""
BINS = 2000
FEWEST = 10
"""Fewer points than this have no density."""


@dataclass(frozen=True)
class Density:
    """A kernel density.

    Attributes:
        points: samples [n, D].
        widths: standard deviation of the kernel in each feature [D].
        volume: V.
    """

    points: Array
    widths: Array
    volume: float

    @property
    def floor(self) -> float:
        """Weight of the uniform part, 1/(n + 1)."""
        return 1 / (len(self.points) + 1)

    def log(self, x: Array) -> Array:
        """Log density [m] at x [m, D]."""
        parts = np.array_split(x, len(x) // CHUNK + 1)  # the kernel of all of them can be large
        kernel = np.concatenate([_kernel(p, self.points, self.widths).mean(1) for p in parts])
        return np.log((1 - self.floor) * kernel + self.floor / self.volume)

    def log_quickly(self, x: Array) -> Array:
        """The same [m] from a table of 2,000 bins where there is one feature, to about a thousandth."""
        if x.shape[1] > 1:
            return self.log(x)
        width = float(self.widths[0])
        low = min(float(x.min()), float(self.points.min())) - 5 * width
        step = (max(float(x.max()), float(self.points.max())) + 5 * width - low) / (BINS - 1)
        at = (self.points[:, 0] - low) / step
        left = np.floor(at).astype(int)
        counts = np.bincount(left, left + 1 - at, BINS) + np.bincount(left + 1, at - left, BINS)
        reach = min(int(5 * width / step) + 1, BINS // 2 - 1)
        z = np.arange(-reach, reach + 1) * step / width
        kernel = np.exp(-0.5 * z * z) / (width * np.sqrt(2 * np.pi)) / len(self.points)
        table = np.convolve(counts, kernel, "same")
        found = np.interp(x[:, 0], low + step * np.arange(BINS), table)
        return np.log((1 - self.floor) * found + self.floor / self.volume)

    def draw(self, count: int, random: np.random.Generator) -> Array:
        """Samples [count, D]; of the kernels alone."""
        at = random.integers(len(self.points), size=count)
        return self.points[at] + self.widths * random.normal(size=(count, self.points.shape[1]))

    def again(self, random: np.random.Generator) -> Density:
        """The density of as many samples of this one: how far it is known."""
        return replace(self, points=self.draw(len(self.points), random))


@dataclass(frozen=True)
class Pooled:
    """Several densities at fixed shares: a known class whose inner shares do not move."""

    parts: tuple[Density, ...]
    shares: Array

    def log(self, x: Array) -> Array:
        """Log density [m] at x [m, D]."""
        logs = np.stack([p.log(x) for p in self.parts], 1)
        return np.logaddexp.reduce(logs + np.log(self.shares), axis=1)

    def log_quickly(self, x: Array) -> Array:
        """The same from tables."""
        logs = np.stack([p.log_quickly(x) for p in self.parts], 1)
        return np.logaddexp.reduce(logs + np.log(self.shares), axis=1)

    def draw(self, count: int, random: np.random.Generator) -> Array:
        """Samples [count, D]."""
        of = random.choice(len(self.parts), size=count, p=self.shares)
        found = np.empty((count, self.parts[0].points.shape[1]))
        for k, part in enumerate(self.parts):
            found[of == k] = part.draw(int((of == k).sum()), random)
        return found

    def again(self, random: np.random.Generator) -> Pooled:
        """The same of densities that are drawn anew."""
        return Pooled(tuple(p.again(random) for p in self.parts), self.shares)


def fit_density(
    points: Array, box: Array, random: np.random.Generator, *, repeats: int = 20
) -> Density:
    """Fit a density; the bandwidth is half of that with the best likelihood in cross-validation.

    Args:
        points: samples [n, D], n ≥ 10.
        box: lowest and highest values [2, D] that occur anywhere.
        random: draws the folds.
        repeats: how many times five folds are drawn.

    Returns:
        The density.

    Raises:
        DataError: there are too few points, a value is not finite, or a feature is constant.
    """
    points = checked(points)
    spread = points.std(0)
    if not (spread > 1e-9 * np.maximum(1.0, np.abs(points).max(0))).all():
        raise DataError("all scores of a group are equal, so they have no density")
    folds = np.stack([random.permutation(len(points)) % FOLDS for _ in range(repeats)])
    member = folds[..., None] == np.arange(FOLDS)  # [repeats, n, 5]
    sizes = member.sum(1)
    volume = float(np.prod(np.maximum(box[1] - box[0], 1e-9)))
    floor = 1 / (len(points) + 1)
    best, widest = -np.inf, FACTORS[-1]
    for factor in FACTORS:
        kernel = _kernel(points, points, factor * spread)
        inside = np.einsum("ij,rjf->rif", kernel, member.astype(float), optimize=True)
        own = np.take_along_axis(inside, folds[..., None], 2)[..., 0]
        outside = (kernel.sum(1) - own) / (
            len(points) - np.take_along_axis(sizes, folds, 1)
        )  # of the other folds
        found = float(np.log((1 - floor) * outside + floor / volume).mean())
        if found > best:
            best, widest = found, factor
    return Density(points, NARROWER * widest * spread, volume)


def checked(points: Array) -> Array:
    """Scores as [n, D] that a density can be fitted on.

    Raises:
        DataError: there are too few, or a value is not finite.
    """
    points = np.asarray(points, dtype=float)
    points = points[:, None] if points.ndim == 1 else points
    if len(points) < FEWEST:
        raise DataError(f"only {len(points)} scores in a group, {FEWEST} are needed for a density")
    if not np.isfinite(points).all():
        raise DataError("a score is NaN or infinite; is a model broken?")
    return points


def _kernel(x: Array, points: Array, widths: Array) -> Array:
    """Values [m, n] of the kernel of each point at each x."""
    found = np.ones((len(x), len(points)))
    for d, width in enumerate(widths):
        z = (x[:, d, None] - points[None, :, d]) / width
        found *= np.exp(-0.5 * z * z) / (width * np.sqrt(2 * np.pi))
    return found
