r"""Prune first, unlearn then: hard masks that every method composes with.

`prune(problem, "omp:0.9")` gives a problem whose model is sparse, whose recipe trains from a fresh
initialisation under the same mask, and whose zeros every later update keeps: \(w = m \odot w\).

| | mask | model |
|---|---|---|
| `omp` | train, drop the smallest \(\lvert w\rvert\) of all together, once | rewound to an early epoch and trained on |
| `imp` | the same again and again, a fifth of what is left each round | rewound after each round |
| `synflow` | untrained and without data: scores \(\lvert w \cdot \partial R/\partial w\rvert\) | trained once |

One-shot and iterative magnitude pruning as in Jia et al. 2023 (sparsity simplifies unlearning);
SynFlow: Tanaka et al. 2020.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from expunge.core.data import map_inputs
from expunge.core.errors import ExpungeError, NeedsError, SettingError
from expunge.core.hashing import content_key, hash_tensors
from expunge.core.problem import Problem
from expunge.core.pruned import keep_only
from expunge.core.runtime import Runtime
from expunge.core.settings import Configured, setting


@runtime_checkable
class Prunable(Protocol):
    """What pruning asks of a recipe; `ClassifierRecipe` has it."""

    epochs: int

    def initial(self, seed: int) -> nn.Module:
        """Return the untrained model that `train` starts from with this seed."""

    def key(self) -> str:
        """Content key."""

    def train(
        self,
        keep_ids: Tensor,
        seed: int,
        runtime: Runtime | None = None,
        *,
        kept: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] | None = None,
        first: int = 0,
        snapshots: Collection[int] = (),
    ) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """Train from epoch `first` on; return the model and the weights after some epochs."""


@dataclass(frozen=True)
class Pruning(Configured):
    """How to prune, and how much."""

    how: Literal["omp", "imp", "synflow"] = setting("omp", "omp, imp or synflow")
    rate: float = setting(0.9, "share of the prunable weights that is removed", above=0)
    rewind: int | None = setting(
        None, "epoch to rewind to (omp, imp); None: 8 of every 182 epochs, at least 1", low=0
    )
    round_rate: float = setting(0.2, "share of what is left that a round of imp removes", above=0)
    edges: bool = setting(True, "whether the first and the last weight tensor are pruned too")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        for name in ("rate", "round_rate"):
            if getattr(self, name) >= 1:
                raise SettingError(f"pruning: {name} must be below 1, not {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """Read `omp:RATE`, `imp:RATE` or `synflow:RATE`.

        Raises:
            SettingError: it is none of these.
        """
        how, colon, rate = text.partition(":")
        if not colon or how not in ("omp", "imp", "synflow"):
            raise SettingError(f"prune={text!r} is not a choice; use omp|imp|synflow:RATE")
        return cls.create({"how": how, "rate": rate})

    def __str__(self) -> str:
        """Return the short form."""
        return f"{self.how}:{self.rate:g}"


@dataclass(frozen=True)
class PrunedRecipe:
    """A recipe under a mask: a fresh initialisation, pruned, then trained as ever."""

    recipe: Prunable
    kept: Mapping[str, Tensor]

    @property
    def epochs(self) -> int:
        """Passes over the kept samples."""
        return self.recipe.epochs

    def __call__(self, keep_ids: Tensor, seed: int, runtime: Runtime | None = None) -> nn.Module:
        """Train on `keep_ids` under the mask."""
        return self.recipe.train(keep_ids, seed, runtime, kept=self.kept)[0]

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the recipe."""
        inner: Callable[[], dict[str, Any]] = getattr(self.recipe, "settings", dict)
        return inner() | {"mask": hash_tensors(self.kept)}

    def key(self) -> str:
        """Content key: that of the dense recipe, and the mask."""
        return content_key([self.recipe.key(), hash_tensors(self.kept)])


def prune(problem: Problem, how: str | Pruning, *, runtime: Runtime | None = None) -> Problem:
    """Prune a problem's model by training it again, as its recipe says, and keep the mask for good.

    Args:
        problem: a dense problem whose recipe can train under a mask.
        how: `omp:RATE`, `imp:RATE`, `synflow:RATE`, or a `Pruning`.
        runtime: device and progress; its seed is that of the training, so that with the seed of
            the original the dense training is the original's.

    Returns:
        The same problem with a pruned model, to be used with any method.

    Raises:
        NeedsError: there is no recipe, or it cannot train under a mask.
        SettingError: the settings do not fit the model or the training.
    """
    pruning = Pruning.parse(how) if isinstance(how, str) else how
    runtime = runtime or Runtime()
    recipe = recipe_of(problem)
    if pruning.how == "synflow":
        untrained = recipe.initial(runtime.seed)
        kept = synflow(untrained, problem, pruning)
        model = recipe.train(problem.train.ids, runtime.seed, runtime, kept=kept)[0]
    else:
        model, kept = by_magnitude(problem, recipe, pruning, runtime)
    return with_mask(problem, pruning, model, kept, runtime.seed)


def recipe_of(problem: Problem) -> Prunable:
    """Return the recipe of a problem that can be pruned.

    Raises:
        NeedsError: there is no recipe, it cannot train under a mask, or the model is pruned already.
    """
    if problem.kept is not None:
        raise NeedsError("this problem's model is pruned already; prune the dense one")
    if problem.recipe is None:
        raise NeedsError("pruning repeats the original training; pass recipe=")
    if not isinstance(problem.recipe, Prunable):
        raise NeedsError(
            "this recipe cannot train under a mask; use xp.ClassifierRecipe, or give yours the "
            "methods initial, train and key that it has"
        )
    return problem.recipe


def with_mask(
    problem: Problem, pruning: Pruning, model: nn.Module, kept: Mapping[str, Tensor], seed: int
) -> Problem:
    """Put a pruned model and its mask into a problem, with a recipe under the same mask."""
    source = {
        "kind": "pruned",
        "of": problem.source,
        "pruning": pruning.in_force(),
        "prune_seed": seed,
    }
    return problem.pruned(
        model,
        kept,
        recipe=PrunedRecipe(recipe_of(problem), kept),
        name=f"{problem.name} ({pruning})",
        source=source,
    )


def by_magnitude(
    problem: Problem, recipe: Prunable, pruning: Pruning, runtime: Runtime
) -> tuple[nn.Module, dict[str, Tensor]]:
    """One-shot or iterative magnitude pruning with rewinding; returns the model and its mask."""
    rewind = max(1, round(recipe.epochs * 8 / 182)) if pruning.rewind is None else pruning.rewind
    if rewind >= recipe.epochs:
        raise SettingError(
            f"pruning: rewind must be below the {recipe.epochs} epochs of the training, not {rewind}"
        )
    ids, seed = problem.train.ids, runtime.seed
    model, early = recipe.train(ids, seed, runtime, snapshots=(rewind,) if rewind else ())
    kept = all_prunable(model, pruning.edges)
    for removed in removals(pruning, sum(m.numel() for m in kept.values())):
        scores = {n: p.detach().abs() for n, p in model.named_parameters() if n in kept}
        kept = without_lowest(scores, kept, removed)
        start = early[0] if rewind else None
        model, _ = recipe.train(ids, seed, runtime, kept=kept, start=start, first=rewind)
    return model, kept


def removals(pruning: Pruning, total: int) -> list[int]:
    """How many of `total` weights are removed after each round; rounds of `imp` end at the rate."""
    rounds = 1
    if pruning.how == "imp":
        exact = math.log(1 - pruning.rate) / math.log(1 - pruning.round_rate)
        rounds = max(1, math.ceil(exact - 1e-9))
    left = 1 - pruning.round_rate
    steps = [round(total * (1 - left**k)) for k in range(1, rounds)]
    return [*steps, round(total * pruning.rate)]


def synflow(
    model: nn.Module, problem: Problem, pruning: Pruning, rounds: int = 100
) -> dict[str, Tensor]:
    r"""Mask of an untrained model by conserved synaptic flow, without a look at the data.

    \(R\) is the sum of the outputs of the network with weights \(|w|\) on an input of ones, the score
    \(|w \cdot \partial R/\partial w|\). A hundred rounds remove the same share of what is left
    each. In eval mode, since batch statistics would break the conservation; in float64, since
    products over many layers overflow otherwise.

    Args:
        model: untrained; left as it was.
        problem: gives the shape of an input and the logits.
        pruning: rate and edges.
        rounds: of scoring.

    Returns:
        The mask.

    Raises:
        ExpungeError: the scores are not finite.
    """
    logits = problem.capability("logits")
    work = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in work.state_dict().values():
            tensor.abs_()
    batch = problem.train.fetch(problem.train.ids[:1])  # for its shape alone
    ones = map_inputs(batch.x, torch.ones_like)
    ones = map_inputs(ones, lambda t: t.double() if t.is_floating_point() else t)
    batch = replace(batch, x=ones, y=None)
    kept = all_prunable(work, pruning.edges)
    parameters = {n: p for n, p in work.named_parameters() if n in kept}
    total = sum(m.numel() for m in kept.values())
    for k in range(1, rounds + 1):
        flow = logits(work, batch).sum()
        found = torch.autograd.grad(flow, list(parameters.values()), allow_unused=True)
        scores = {
            n: torch.zeros_like(p) if g is None else (g * p).detach().abs()
            for (n, p), g in zip(parameters.items(), found, strict=True)
        }
        if not all(bool(s.isfinite().all()) for s in scores.values()):
            raise ExpungeError("synflow: the scores of this network are not finite")
        removed = round(total * (1 - (1 - pruning.rate) ** (k / rounds)))
        kept = without_lowest(scores, kept, removed)
        keep_only(work, kept)
    return kept


def all_prunable(model: nn.Module, edges: bool) -> dict[str, Tensor]:
    """A mask that keeps everything: all trainable tensors of two dimensions or more.

    Raises:
        SettingError: there is none.
    """
    names = [n for n, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad]
    names = names if edges else names[1:-1]
    if not names:
        raise SettingError("pruning: the model has no weight matrix to prune with these settings")
    return {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in names}


def without_lowest(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], removed: int
) -> dict[str, Tensor]:
    """Remove the lowest scores over all tensors together until `removed` weights are gone in all.

    What was removed before stays removed; ties go by position.
    """
    flat = torch.cat([scores[n].masked_fill(~m, -math.inf).reshape(-1) for n, m in kept.items()])
    lowest = flat.argsort(stable=True)[:removed]
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[lowest] = False
    parts = mask.split([m.numel() for m in kept.values()])
    return {n: part.view_as(m) for (n, m), part in zip(kept.items(), parts, strict=True)}
