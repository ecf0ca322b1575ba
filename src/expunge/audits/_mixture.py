r"""The fraction of a new class in an unlabelled population: a mixture, its likelihood, and limits.

\[ \tilde p(x) = C(x;\theta)\sum_k \pi_k \frac{p_k(x)}{Z_k(\theta)} + \pi_{new}\, p_{new}(x), \qquad
   C(x;\theta) = \prod_d \frac{1}{1 + e^{-b_d (x_d - c_d)}} \]

The known classes' densities \(p_k\) come from labelled samples; their shares \(\pi_k\) are free (prior
shift), and one monotone sigmoid a feature bends them all alike (covariate shift); \(Z_k\) is the mean of C
under \(p_k\), so that what is bent integrates to one. The slopes have a prior \(b_d \sim N(0, 0.3^2)\):
without it C takes up whatever signal there is. Fitted by EM: the shares in closed form, θ by a numerical
maximisation of the expected log-likelihood. The limit is the largest \(\pi_{new}\) with

\[ TS(\pi) = -2 \ln \frac{L(\pi, \text{best of the rest})}{L_{max}} \le t, \]

t = 2.71 for a one-sided limit of 95 %, 3.84 for the paper's. Where TS stays below it over all of 0 … 1 the
data cannot tell, and the limit is 1. Source: arXiv 2503.14584; the renormalisation and 2.71 are derived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from expunge.audits._density import Array, Density, Pooled, checked, fit_density

ONE_SIDED, TWO_SIDED = 2.71, 3.84
"""Thresholds of TS at 95 % for one degree of freedom."""
SLOPE = 0.3
"""Standard deviation of the prior of a slope b."""
STEEPEST = 3.0
POINTS = 400
"""Places over which C is averaged, a dimension."""
MOST, ENOUGH = 3000, 1e-8
"""Iterations of EM, and the gain of the log-likelihood at which it stops."""


@dataclass(frozen=True)
class Mixture:
    """Densities of the known classes and of the new one, and points to average C over.

    Attributes:
        known: of each known class.
        new: of the new class.
        points: where C is looked at [M, D].
        weights: of these points for each known class [K, M]; each row has sum 1.
    """

    known: tuple[Density | Pooled, ...]
    new: Density
    points: Array = field(repr=False)
    weights: Array = field(repr=False)

    @classmethod
    def of(
        cls, known: Sequence[Array], new: Array, unlabelled: Array, random: np.random.Generator
    ) -> Mixture:
        """Fit the densities.

        Args:
            known: scores [n_k] or [n_k, D] of each known class.
            new: scores of the new class.
            unlabelled: scores of the population, for the range that scores have.
            random: draws folds and samples.

        Returns:
            The mixture.

        Raises:
            DataError: a group is too small, constant, or holds what is no number.
        """
        groups = [checked(g) for g in (*known, new)]
        everything = np.concatenate([*groups, checked(unlabelled)])
        box = np.stack([everything.min(0), everything.max(0)])
        *fitted, last = (fit_density(g, box, random) for g in groups)
        if box.shape[1] == 1:
            points = np.linspace(box[0, 0], box[1, 0], POINTS)[:, None]
        else:  # no grid in several dimensions: uniform draws
            points = box[0] + (box[1] - box[0]) * random.random((POINTS * 10, box.shape[1]))
        return cls(tuple(fitted), last, points, _weights(fitted, points))

    def pooled(self, shares: Sequence[int]) -> Mixture:
        """One known class in place of several, at shares in proportion to `shares`: no prior shift."""
        parts = tuple(p for p in self.known if isinstance(p, Density))
        one = Pooled(parts, np.asarray(shares, dtype=float) / np.sum(shares))
        return Mixture((one,), self.new, self.points, _weights([one], self.points))

    def logs(self, x: Array, *, quickly: bool = False) -> Array:
        """Log densities [m, K + 1] at x [m, D], the new class last; `quickly` from tables."""
        parts = (*self.known, self.new)
        return np.stack([p.log_quickly(x) if quickly else p.log(x) for p in parts], 1)


@dataclass(frozen=True)
class Fit:
    r"""Best parameters.

    Attributes:
        shares: \(\pi_1 … \pi_K, \pi_{new}\) [K + 1], of sum 1.
        slope: b [D]; zeros without the covariate term.
        centre: c [D].
        likelihood: ln L, with the slopes' prior if they are free.
        trace: ln L after each iteration.
        posterior: share of the new class in each sample's density [n].
    """

    shares: Array
    slope: Array
    centre: Array
    likelihood: float
    trace: Array
    posterior: Array

    @property
    def fraction(self) -> float:
        """The new class's share."""
        return float(self.shares[-1])


def em(
    logs: Array, fraction: Array | None = None, start: Array | None = None, *,
    most: int = MOST, enough: float = ENOUGH,
) -> tuple[Array, Array]:  # fmt: skip
    """Shares of known densities in one or many populations at once (no covariate term).

    Two steps of EM at a time, and a longer one in their direction where that is better still
    (Varadhan and Roland 2008): ln L never falls.

    Args:
        logs: log densities [B, n, J], the new class last.
        fraction: its share [B] if that is given.
        start: shares [B, J] to start from.
        most: largest number of iterations.
        enough: gain of ln L below which a population is done.

    Returns:
        Shares [B, J] and ln L [B].
    """
    batch, size, count = logs.shape
    top = logs.max(2, keepdims=True)
    densities, offset = np.exp(logs - top), top[..., 0].sum(1)
    shares = np.full((batch, count), 1 / count) if start is None else start.copy()
    shares = shares if fraction is None else _with(shares, fraction)
    values = np.full(batch, -np.inf)
    going = np.arange(batch)

    def step(x: Array, p: Array, fixed: Array | None) -> tuple[Array, Array]:
        total = (p @ x[..., None])[..., 0]
        new = x * (1 / total[:, None] @ p)[:, 0] / size
        return (new if fixed is None else _with(new, fixed)), np.log(total).sum(1)

    for _ in range(most):
        p, zero = densities[going], shares[going]
        fixed = None if fraction is None else fraction[going]
        one, before = step(zero, p, fixed)
        two, _ = step(one, p, fixed)
        first, second = one - zero, two - 2 * one + zero
        norm = np.sqrt((second**2).sum(1, keepdims=True))
        far = np.maximum(1.0, np.sqrt((first**2).sum(1, keepdims=True)) / np.maximum(norm, 1e-300))
        jump = np.clip(zero + 2 * far * first + far**2 * second, 1e-15, None)
        jump /= jump.sum(1, keepdims=True)
        jump = jump if fixed is None else _with(jump, fixed)
        three, after = step(jump, p, fixed)
        four, plain = step(two, p, fixed)
        better = after > plain
        shares[going] = np.where(better[:, None], three, four)
        values[going] = np.maximum(after, plain)
        going = going[values[going] - before >= enough]
        if not len(going):
            break
    totals = (densities @ shares[..., None])[..., 0]
    return shares, np.log(totals).sum(1) + offset


def _with(shares: Array, fraction: Array) -> Array:
    """The same shares among the known classes, the new one's set."""
    known = shares[:, :-1] + 1e-300
    scaled = known / known.sum(1, keepdims=True) * (1 - fraction[:, None])
    return np.concatenate([scaled, fraction[:, None]], 1)


class Population:
    """An unlabelled population under a mixture: fits, the profile of its likelihood, and limits."""

    def __init__(self, mixture: Mixture, x: Array, *, covariate: bool = False) -> None:
        """Evaluate the densities.

        Args:
            mixture: of known classes and the new one.
            x: scores [n] or [n, D].
            covariate: whether the known classes may be bent.
        """
        self.mixture, self.x, self.covariate = mixture, checked(x), covariate
        self.logs = mixture.logs(self.x)
        self.best = self.fit()
        if covariate:  # a fit from without the bend may be better than one from a bend
            self._improve()

    def fit(self, fraction: float | None = None, start: Fit | None = None) -> Fit:
        """Maximise the likelihood, with the new class's share given or free."""
        fixed = None if fraction is None else np.array([fraction])
        width = self.x.shape[1]
        slope = np.zeros(width) if start is None else start.slope
        centre = np.median(self.x, axis=0) if start is None else start.centre
        begin = None if start is None else np.maximum(start.shares, 1e-6)[None]
        if not self.covariate:
            trace = []
            shares, value = em(self.logs[None], fixed, begin)
            trace.append(float(value[0]))
            return Fit(
                shares[0], slope, centre, float(value[0]), np.array(trace),
                self._posterior(self.logs, shares[0]),
            )  # fmt: skip
        return self._bent(fixed, begin, slope, centre)

    def _bent(self, fixed: Array | None, begin: Array | None, slope: Array, centre: Array) -> Fit:
        """EM with the covariate term; every step raises the penalised likelihood."""
        logs = self._bend(slope, centre)
        shares, _ = em(logs[None], fixed, begin, most=200, enough=1e-3)
        trace = [self._value(logs, shares[0], slope)]
        for _ in range(200):
            weighed = logs + np.log(np.maximum(shares, 1e-300))
            gamma = np.exp(weighed - np.logaddexp.reduce(weighed, axis=1, keepdims=True))
            slope, centre = self._turn(gamma[:, :-1], slope, centre)
            logs = self._bend(slope, centre)
            shares, _ = em(logs[None], fixed, shares, most=60, enough=1e-5)
            trace.append(self._value(logs, shares[0], slope))
            if trace[-1] - trace[-2] < 1e-4:
                break
        return Fit(
            shares[0], slope, centre, trace[-1], np.array(trace), self._posterior(logs, shares[0])
        )

    def _improve(self) -> None:
        for fraction in (0.0, 0.5):
            other = self.fit(start=self.fit(fraction))
            if other.likelihood > self.best.likelihood:
                self.best = other

    def _bend(self, slope: Array, centre: Array) -> Array:
        """Log densities [n, K + 1] with the known classes bent."""
        bend = _log_c(self.x, slope, centre)
        found = self.logs.copy()
        mean = self.mixture.weights @ np.exp(_log_c(self.mixture.points, slope, centre))
        found[:, :-1] += bend[:, None] - np.log(mean)
        return found

    def _turn(self, gamma: Array, slope: Array, centre: Array) -> tuple[Array, Array]:
        """The bend that maximises the expected log-likelihood, or the old one if none is better."""
        from scipy.optimize import minimize

        each, counts = gamma.sum(1), gamma.sum(0)
        low, high = self.x.min(0), self.x.max(0)
        d = len(slope)

        def loss(theta: Array) -> tuple[float, Array]:
            b, c = theta[:d], theta[d:]
            value = float(each @ _log_c(self.x, b, c)) - float((b**2).sum()) / (2 * SLOPE**2)
            grad = each @ _slopes(self.x, b, c)
            grad[:d] -= b / SLOPE**2
            weight = self.mixture.weights * np.exp(_log_c(self.mixture.points, b, c))
            mean = weight.sum(1)
            value -= float(counts @ np.log(mean))
            grad -= (counts / mean) @ weight @ _slopes(self.mixture.points, b, c)
            return -value, -grad

        begin = np.concatenate([slope, centre])
        bounds = [(-STEEPEST, STEEPEST)] * d + list(zip(low, high, strict=True))
        found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 15})  # fmt: skip
        theta = found.x if found.fun <= loss(begin)[0] else begin
        return theta[:d], theta[d:]

    def _value(self, logs: Array, shares: Array, slope: Array) -> float:
        """Penalised ln L."""
        weighed = logs + np.log(np.maximum(shares, 1e-300))
        inside = float(np.logaddexp.reduce(weighed, axis=1).sum())
        return inside - float((slope**2).sum()) / (2 * SLOPE**2)

    @staticmethod
    def _posterior(logs: Array, shares: Array) -> Array:
        weighed = logs + np.log(np.maximum(shares, 1e-300))
        return np.exp(weighed[:, -1] - np.logaddexp.reduce(weighed, axis=1))

    def ts(self, fraction: float, start: Fit | None = None) -> float:
        """TS at a share of the new class; never below 0."""
        return max(0.0, -2 * (self.fit(fraction, start).likelihood - self.best.likelihood))

    def curve(self, points: int = 41) -> tuple[Array, Array]:
        """Shares [points] over 0 … 1 and TS at each, outwards from the best so that fits start near."""
        at = np.linspace(0, 1, points)
        found = np.empty(points)
        middle = int(np.searchsorted(at, self.best.fraction))
        for side in (range(middle, points), range(middle - 1, -1, -1)):
            near = self.best
            for i in side:
                near = self.fit(float(at[i]), near)
                found[i] = max(0.0, -2 * (near.likelihood - self.best.likelihood))
        return at, found

    def limit(
        self, threshold: float | Callable[[float], float] = ONE_SIDED, *, lower: bool = False
    ) -> float:
        """The share furthest from the best, upward or downward, with TS up to a threshold.

        Args:
            threshold: of TS; one number, or one for each share.
            lower: downward.

        Returns:
            A number in 0 … 1, at least the best share (with `lower`: at most).
        """
        allowed = threshold if callable(threshold) else lambda _: threshold
        inside, outside = self.best.fraction, 0.0 if lower else 1.0
        if self.ts(outside) <= allowed(outside):
            return outside
        if callable(
            threshold
        ):  # it may be crossed more than once: the crossing furthest out counts
            for at in np.linspace(outside, inside, 12)[1:-1]:
                if self.ts(float(at), self.best) <= allowed(float(at)):
                    inside = float(at)
                    break
                outside = float(at)
        for _ in range(12):
            middle = (inside + outside) / 2
            if self.ts(middle, self.best) <= allowed(middle):
                inside = middle
            else:
                outside = middle
        return outside  # rounding never makes the interval smaller

    @property
    def identifiable(self) -> bool:
        """Whether either end of 0 … 1 is excluded."""
        return self.ts(0.0) > ONE_SIDED or self.ts(1.0) > ONE_SIDED


def limits(logs: Array, threshold: float = ONE_SIDED) -> tuple[Array, Array, Array]:
    """Best share, upper limit and ln L of many populations at once (no covariate term).

    Args:
        logs: log densities [B, n, J], the new class last.
        threshold: of TS.

    Returns:
        Three arrays [B].
    """
    shares, best = em(logs, enough=1e-6)
    first = shares[:, -1].copy()
    inside, outside = first, np.ones(len(logs))
    _, end = em(logs, outside, shares, enough=1e-6)
    open_ended = -2 * (end - best) <= threshold
    for _ in range(10):
        middle = (inside + outside) / 2
        shares, value = em(logs, middle, shares, enough=1e-6)
        within = -2 * (value - best) <= threshold
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    return first, np.where(open_ended, 1.0, outside), best


def _weights(densities: Sequence[Density | Pooled], points: Array) -> Array:
    """Weights [K, M] with which a mean over points is one under each density."""
    found = np.stack([np.exp(d.log(points)) for d in densities])
    return found / found.sum(1, keepdims=True)


def _log_c(x: Array, slope: Array, centre: Array) -> Array:
    """Log of C [m]."""
    return -np.logaddexp(0.0, -slope * (x - centre)).sum(1)


def _slopes(x: Array, slope: Array, centre: Array) -> Array:
    """Derivatives [m, 2 D] of ln C by slopes and centres."""
    rest = 1 / (1 + np.exp(np.clip(slope * (x - centre), -700, 700)))
    return np.concatenate([rest * (x - centre), -rest * slope], 1)
