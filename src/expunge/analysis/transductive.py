r"""Transductive few-shot classification: all queries of a task at once, by a generalised EM whose knobs are learnt.

With soft assignments u of Q queries, few labelled supports y and class parameters θ, it lowers

\[
J = -\sum_{q,k} u_{qk} \ln p(z_q \mid \theta_k) - \sum_{s,k} y_{sk} \ln p(z_s \mid \theta_k)
    + \lambda Q H(\pi) + T \sum_{q,k} u_{qk} \ln u_{qk}, \qquad \pi_k = \tfrac1Q \sum_q u_{qk},
\]

of which each layer ℓ takes one turn:
\(u_{qk} \leftarrow \mathrm{softmax}_k[(\ln p(z_q \mid \theta_k) + \lambda_\ell \ln \pi_k) / T_\ell]\), then π, then
the likeliest θ. λ prefers few and unequal classes, T softens. UNEM (Zhou et al., CVPR 2025, arXiv
2412.16739) learns λ, T and the scale of the features from tasks whose answers are known. Classes are
Gaussians of identity covariance over features, or Dirichlet distributions over probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from expunge.core.errors import DataError

Family = Literal["gaussian", "dirichlet"]
LEAST = 1e-6
"""Added to the share of each class."""
TINY = 1e-15
"""Added to probabilities before their logarithm."""


@dataclass
class Knobs:
    r"""The knobs before \(\mathrm{softplus}\), so that every value is allowed.

    Attributes:
        gamma: [L]; λ = softplus(γ).
        warmth: [L]; T = 1 + softplus(t).
        feature: [], of a Gaussian the scale of the features is its softplus; of a Dirichlet it is not used,
            since probabilities have a scale.
    """

    gamma: Tensor
    warmth: Tensor
    feature: Tensor

    @classmethod
    def start(cls, layers: int, gamma: float = 1.0) -> Knobs:
        """Where learning starts: γ as given, t = 1, scale softplus(1)."""
        return cls(torch.full((layers,), gamma), torch.ones(layers), torch.ones(()))

    @classmethod
    def of(cls, lam: float, temperature: float, layers: int) -> Knobs:
        """Fixed λ ≥ 0 and T ≥ 1 in every layer, features as they are."""
        return cls(
            _inverse(torch.full((layers,), lam)), _inverse(torch.full((layers,), temperature - 1)),
            _inverse(torch.ones(())),
        )  # fmt: skip

    @property
    def lam(self) -> Tensor:
        """λ [L]."""
        return softplus(self.gamma)

    @property
    def temperature(self) -> Tensor:
        """T [L]."""
        return 1 + softplus(self.warmth)

    def tensors(self) -> list[Tensor]:
        """What is learnt."""
        return [self.gamma, self.warmth, self.feature]


@dataclass(frozen=True)
class Tasks:
    """Few-shot tasks, side by side.

    Attributes:
        support: [B, S, d].
        labels: classes [B, S] of the supports, each of the K classes at least once.
        query: [B, Q, d].
        truth: classes [B, Q] of the queries.
        ways: K.
    """

    support: Tensor
    labels: Tensor
    query: Tensor
    truth: Tensor
    ways: int


def assign(tasks: Tasks, knobs: Knobs, family: Family = "gaussian") -> Tensor:
    r"""\(\ln u\) [B, Q, K] of the last layer; without layers, the nearest class of the supports."""
    return (_gaussian if family == "gaussian" else _dirichlet)(tasks, knobs)


def _gaussian(tasks: Tasks, knobs: Knobs) -> Tensor:
    z, query = tasks.support, tasks.query
    # features that are scaled by s have densities that are scaled by s²: no gradient through them
    scale = softplus(knobs.feature).square()
    given = one_hot(tasks.labels, tasks.ways).to(z.dtype).mT  # [B, K, S]
    count, total = given.sum(-1, keepdim=True), given @ z
    scores = gaussian_density(query, total / count)
    centres, prior = total / count, torch.zeros(())  # in the first layer all classes are as likely
    for lam, temperature in zip(knobs.lam, knobs.temperature, strict=True):
        scores = (scale * gaussian_density(query, centres) + lam * prior) / temperature
        u = scores.softmax(-1)
        prior = (u.mean(1, keepdim=True) + LEAST).log()
        centres = (total + u.mT @ query) / (count + u.sum(1)[..., None])
    return scores.log_softmax(-1)


def gaussian_density(z: Tensor, centres: Tensor) -> Tensor:
    r"""\(-\tfrac12\|z - w_k\|^2 + \tfrac12\|z\|^2\) [B, Q, K] of z [B, Q, d] and centres [B, K, d].

    What it leaves out is the same for all classes.
    """
    return z @ centres.mT - centres.square().sum(-1)[:, None] / 2


def _dirichlet(tasks: Tasks, knobs: Knobs) -> Tensor:
    support, query = ((x + TINY).log() for x in (tasks.support, tasks.query))
    given = one_hot(tasks.labels, tasks.ways).to(support.dtype).mT
    count, total = given.sum(-1, keepdim=True), given @ support
    alpha = solve_alpha(total / count)
    scores = dirichlet_density(query, alpha)
    u = scores.softmax(-1)
    for lam, temperature in zip(knobs.lam, knobs.temperature, strict=True):
        mean = (total + u.mT @ query) / (count + u.sum(1)[..., None])
        alpha = solve_alpha(mean, alpha.detach())
        prior = (u.mean(1, keepdim=True) + LEAST).log()
        scores = (dirichlet_density(query, alpha) + lam * prior) / temperature
        u = scores.softmax(-1)
    return scores.log_softmax(-1)


def dirichlet_density(logs: Tensor, alpha: Tensor) -> Tensor:
    r"""\(\ln\Gamma(\sum_j\alpha_j) - \sum_j\ln\Gamma(\alpha_j) + \sum_j(\alpha_j - 1)\ln x_j\) [B, Q, K].

    Args:
        logs: ln x [B, Q, D].
        alpha: [B, K, D].
    """
    norm = alpha.sum(-1).lgamma() - alpha.lgamma().sum(-1)
    return norm[:, None] + logs @ (alpha - 1).mT


def solve_alpha(mean: Tensor, start: Tensor | None = None, steps: int = 1000) -> Tensor:
    r"""The likeliest Dirichlet of mean log-probabilities: \(\psi(\alpha_j) - \psi(\sum\alpha) = \bar y_j\).

    By majorise–minimise: with \(c(\alpha) = 2\,|\ln\Gamma(1) - \ln\Gamma(\alpha+1) + \alpha\psi(\alpha+1)| / \alpha^2\) and
    \(b = \psi(\alpha+1) - \psi(\sum\alpha) - c\alpha - \bar y\), \(\alpha \leftarrow (-b + \sqrt{b^2 + 4c}) / 2c\). In double
    precision without gradient; one Newton step then gives α the gradient of the solution.

    Args:
        mean: ȳ [..., D], below 0.
        start: α to start from [..., D]; ones if left out.
        steps: most steps; it ends where the relative squared change falls below 1e-11.

    Returns:
        α [..., D] in the precision of `mean`.
    """
    wanted = mean.detach().double()
    alpha = torch.ones_like(wanted) if start is None else start.detach().double()
    for step in range(steps):
        before = alpha
        c = _curvature(alpha)
        b = torch.digamma(alpha + 1) - alpha.sum(-1, keepdim=True).digamma() - c * alpha - wanted
        alpha = (-b + (b.square() + 4 * c).sqrt()) / (2 * c)
        if step % 50 == 49 and float((alpha - before).norm() / before.norm()) ** 2 < 1e-11:
            break
    if not mean.requires_grad:
        return alpha.to(mean.dtype)
    # the Jacobian is diag(a) − s·11ᵀ, whose inverse is known
    a = torch.polygamma(1, alpha)
    s = torch.polygamma(1, alpha.sum(-1, keepdim=True))
    residual = torch.digamma(alpha) - alpha.sum(-1, keepdim=True).digamma() - mean.double()
    inner = residual / a
    shared = s * inner.sum(-1, keepdim=True) / (1 - s * (1 / a).sum(-1, keepdim=True))
    return (alpha - inner - shared / a).to(mean.dtype)


def _curvature(alpha: Tensor) -> Tensor:
    exact = 2 * (alpha * torch.digamma(alpha + 1) - (alpha + 1).lgamma()).abs() / alpha.square()
    return torch.where(alpha > 1e-4, exact, torch.pi**2 / 6)  # its limit at 0 is ψ′(1)


def learn(
    draw: Callable[[int], Tasks],
    *,
    layers: int = 10,
    steps: int = 60,
    lr: float = 0.1,
    tasks: int = 200,
    gamma: float = 1.0,
    family: Family = "gaussian",
) -> Knobs:
    """Learn the knobs: Adam on the cross-entropy of the last layer, over the same tasks in every step.

    Args:
        draw: tasks with known answers, as many as it is asked for.
        layers: L.
        steps: of Adam; the rate is halved after half of them.
        lr: its rate.
        tasks: how many.
        gamma: where γ starts.
        family: of the classes.

    Returns:
        The knobs, without gradients.

    Raises:
        DataError: the loss is not finite.
    """
    given = draw(tasks)
    knobs = Knobs.start(layers, gamma)
    for tensor in knobs.tensors():
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(knobs.tensors(), lr=lr)
    halve = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 2), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(assign(given, knobs, family).flatten(0, 1), given.truth.flatten())
        if not bool(loss.isfinite()):
            raise DataError("the loss of the few-shot tasks is not finite; are the features?")
        loss.backward()
        if layers:
            optimizer.step()
            halve.step()
    return Knobs(*(tensor.detach() for tensor in knobs.tensors()))


def draw_tasks(
    pools: list[Tensor],
    number: int,
    generator: torch.Generator,
    *,
    shots: int,
    queries: int,
    present: int,
    always: tuple[int, ...] = (),
) -> Tasks:
    """Tasks from pools of samples: every class has supports, the queries come from a few of them.

    Args:
        pools: samples [n_k, d] of each of the K classes, more than `shots` in each.
        number: how many tasks.
        generator: what is drawn.
        shots: supports of each class.
        queries: Q; fewer where the classes that are present have fewer samples left.
        present: classes that the queries come from, `always` among them.
        always: classes whose samples are among the queries of every task.

    Raises:
        DataError: a class has no sample besides its supports.
    """
    if min(map(len, pools)) <= shots:
        raise DataError(
            f"{shots} labelled samples a class leave none to ask about: the smallest class has {min(map(len, pools))}"
        )
    ways = len(pools)
    present = min(max(present, len(always)), ways)
    others = [k for k in range(ways) if k not in always]
    rest = sorted(len(p) - shots for p in pools)[:present]
    queries = min(queries, sum(rest))
    supports, asked, truths = [], [], []
    for _ in range(number):
        order = [p[torch.randperm(len(p), generator=generator)] for p in pools]
        drawn = torch.randperm(len(others), generator=generator)[: present - len(always)]
        there = [*always, *(others[n] for n in drawn.tolist())]
        pool = torch.cat([order[k][shots:] for k in there])
        truth = torch.cat([torch.full((len(order[k]) - shots,), k) for k in there])
        first = torch.cumsum(torch.tensor([0, *(len(order[k]) - shots for k in there[:-1])]), 0)
        sure = first[: len(always)]  # one query at least of those that must be there
        free = torch.ones(len(pool), dtype=torch.bool)
        free[sure] = False
        more = free.nonzero().flatten()
        more = more[torch.randperm(len(more), generator=generator)[: queries - len(sure)]]
        chosen = torch.cat([sure, more])
        supports.append(torch.cat([o[:shots] for o in order]))
        asked.append(pool[chosen])
        truths.append(truth[chosen])
    labels = torch.arange(ways).repeat_interleave(shots).expand(number, -1)
    return Tasks(torch.stack(supports), labels, torch.stack(asked), torch.stack(truths), ways)


def _inverse(value: Tensor) -> Tensor:
    """What softplus takes to a value ≥ 0."""
    return value + (-(-value).expm1()).clamp(min=1e-30).log()
