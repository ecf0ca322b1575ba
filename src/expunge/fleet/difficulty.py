r"""Difficulty of training samples, averaged over short trainings from several seeds.

For runs \(r = 1 \dots R\) stopped after the same epoch, \(s(x) = \frac1R \sum_r s_r(x)\), where
\(s_r\) is one of the scores of `example_scores`. A high value mixes "hard", "rare" and
"mislabelled": it says where to look, and is no reason to delete anything by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from expunge import __version__
from expunge.core.data import Data
from expunge.core.errors import ExpungeError, NeedsError, SettingError, UserError
from expunge.core.hashing import content_key
from expunge.core.problem import Problem
from expunge.core.request import Request, forget
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata
from expunge.fleet.example_scores import ForgettingEvents, score_model
from expunge.fleet.executors import chosen
from expunge.fleet.jobs import Job
from expunge.train.recipe import Stopped, SupervisedRecipe

if TYPE_CHECKING:
    from expunge.store import Store

Score = Literal["el2n", "l1", "max-margin", "sum-margin", "grand", "forgetting", "forgetting-clean"]
Choice = Literal["keep_max", "keep_min", "offset"]
Part = Literal["low", "middle", "high"]


@dataclass(frozen=True)
class Difficulty:
    """Scores of all training samples; higher is harder.

    Attributes:
        score: which score.
        epoch: epochs of training before the score was taken; over which events were counted.
        ids: sorted ids [N].
        runs: one row a training, float64 [R, N] in the order of `ids`.
        input_norm: rank correlation of the mean with the inputs' length; near 1 a score says little
            else (GraNd at initialisation does).
        notes: what to know before trusting it.
    """

    score: str
    epoch: int
    ids: Tensor
    runs: Tensor
    input_norm: float
    notes: tuple[str, ...] = field(default=())

    @property
    def values(self) -> Tensor:
        """Mean over the trainings [N]; ∞ where a sample was never right in one of them."""
        return self.runs.mean(0)

    def of(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Values of some samples, in that order.

        Raises:
            UserError: a sample has no score.
        """
        wanted = torch.as_tensor(ids).long()
        places = torch.searchsorted(self.ids, wanted).clamp_max(len(self.ids) - 1)
        if not torch.equal(self.ids[places], wanted):
            raise UserError("a sample that was not in the training data has no difficulty")
        return self.values[places]

    def ranked(self) -> Tensor:
        """Ids from the easiest to the hardest; of equal ones the smaller id first."""
        return self.ids[torch.argsort(self.values, stable=True)]

    def keep(self, count: int, choice: Choice = "keep_max", offset: int = 0) -> Tensor:
        """Choose a part of the training data.

        Args:
            count: samples to keep, k.
            choice: `keep_max` the hardest, `keep_min` the easiest, `offset` the next after the
                `offset` easiest, which leaves out the very hardest where labels are noisy.
            offset: easiest samples to pass over with `offset`.

        Returns:
            Sorted ids.

        Raises:
            SettingError: so many are not there.
        """
        if choice not in get_args(Choice):
            raise SettingError(f"choice is one of {', '.join(get_args(Choice))}, not {choice!r}")
        first = {"keep_max": len(self.ids) - count, "keep_min": 0, "offset": offset}[choice]
        if count < 1 or first < 0 or first + count > len(self.ids):
            raise SettingError(
                f"there are {len(self.ids)} samples: not {count} after the {max(first, 0)} easiest"
            )
        return self.ranked()[first : first + count].sort().values

    def request(
        self,
        part: Part = "high",
        *,
        count: int | None = None,
        share: float = 0.1,
        among: Tensor | None = None,
        reason: str = "",
    ) -> Request:
        """A forget set of a given difficulty.

        Args:
            part: `low`: the easiest, `high`: the hardest, `middle`: those around the median.
            count: how many.
            share: how many instead of `count`, as a share of the samples to choose among.
            among: ids to choose among, e.g. those apart from a reported request; all by default.
            reason: kept with the request.

        Raises:
            SettingError: the part is unknown or so many are not there.
        """
        ranked = self.ranked()
        if among is not None:
            ranked = ranked[torch.isin(ranked, among)]
        count = round(share * len(ranked)) if count is None else count
        if not 0 < count <= len(ranked):
            raise SettingError(f"{count} of {len(ranked)} samples cannot be chosen")
        starts = {"low": 0, "middle": (len(ranked) - count) // 2, "high": len(ranked) - count}
        if part not in starts:
            raise SettingError(f"part is one of {', '.join(starts)}, not {part!r}")
        chosen = ranked[starts[part] :][:count].sort().values
        return forget(ids=chosen, reason=reason or f"{part} {self.score}")

    def strata(self, names: Sequence[str] = ("easy", "medium", "hard")) -> Strata:
        """Parts of equal size by rank, named from the easiest to the hardest."""
        parts = torch.tensor_split(self.ranked(), len(names))
        about = f"{self.score} after {self.epoch} epochs, mean of {len(self.runs)} trainings"
        return Strata(dict(zip(names, parts, strict=True)), about)

    def noise(self, mislabelled: Tensor | Sequence[int]) -> dict[str, float | int]:
        """How well the score finds samples known to be mislabelled.

        Args:
            mislabelled: their ids, at least one and not all.

        Returns:
            `auc`: P(a mislabelled sample scores above another), ½ is chance; `precision`: share of
            mislabelled samples among as many hardest ones; `infinite`: share of samples whose mean
            is ∞; `mislabelled`: how many there are.
        """
        from expunge.audits._intervals import auc

        known = torch.isin(self.ids, torch.as_tensor(mislabelled).long())
        count = int(known.sum())
        if not 0 < count < len(self.ids):
            raise UserError("to judge a score, name some mislabelled samples, and not all samples")
        values = self.values.numpy()
        hardest = torch.isin(self.ids, self.keep(count))
        return {
            "auc": auc(values[known.numpy()], values[~known.numpy()]),
            "precision": float(known[hardest].double().mean()),
            "infinite": float(np.isinf(values).mean()),
            "mislabelled": count,
        }


def difficulty(
    problem: Problem,
    score: Score = "el2n",
    *,
    runs: int = 10,
    epoch: int | None = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
) -> Difficulty:
    """Score every training sample by short trainings of the problem's recipe.

    Networks are in eval mode and the data as it is, but for `forgetting`: that looks at the batches
    of the training themselves, in train mode, before each step. `forgetting-clean` looks at all
    samples after each epoch instead: a smoother number, and another one.

    Args:
        problem: gives data, recipe, logits and loss.
        score: see `example_scores`; `grand` needs no logits, the others are for classifiers.
        runs: trainings R, each with its own seed.
        epoch: epochs before the score is taken, 0 for untrained networks. None takes a tenth of the
            recipe's (at least one), and all of them for `forgetting`.
        store: where scores are kept and looked up.
        runtime: seed, device, progress and engine. Scores of `forgetting` look into each training,
            and are always taken one by one.

    Returns:
        The scores.

    Raises:
        NeedsError: the problem has no recipe that can be stopped early, or no labels.
        SettingError: `score`, `runs` or `epoch` is not possible.
        ExpungeError: a score is not a number.
    """
    runtime = runtime or Runtime()
    epoch, key = plan(problem, score, runs, epoch, runtime)
    recipe = recipe_of(problem)
    ids = problem.train.ids.sort().values  # the order of storage makes no difference
    found = None if store is None else store.find("difficulty", key)
    if store is not None and found is not None:
        rows = store.tensors(found)["runs"]
    else:
        with runtime.metered(), runtime.task(f"difficulty: {score}", runs) as task:
            made = {}
            for run, row in _rows(problem, recipe, score, ids, runs, epoch, runtime):
                made[run] = row
                task.advance()
        rows = torch.stack([made[run] for run in range(runs)])
        if store is not None:
            record = {"problem": problem.name, "score": score, "epoch": epoch, "runs": runs}
            store.put_run(kind="difficulty", key=key, record=record, tensors={"runs": rows})
    if bool(rows.isnan().any()):
        raise ExpungeError(f"{score} is not a number for some samples; look at the recipe's lr")
    lengths = _input_lengths(problem.train, ids)
    return Difficulty(
        score, epoch, ids, rows, spearman(rows.mean(0), lengths), tuple(_notes(score, epoch))
    )


def plan(
    problem: Problem, score: str, runs: int, epoch: int | None, runtime: Runtime
) -> tuple[int, str]:
    """Check what is asked of `difficulty`, before any work.

    Returns:
        The epoch, and the content key that the scores are kept under.

    Raises:
        NeedsError: see `difficulty`.
        SettingError: see `difficulty`.
    """
    recipe = recipe_of(problem)
    if score not in get_args(Score):
        raise SettingError(f"score is one of {', '.join(get_args(Score))}, not {score!r}")
    events = score.startswith("forgetting")
    if problem.train.labels is None or (score != "grand" and not problem.can("logits")):
        raise NeedsError(f"{score} needs labels{'' if score == 'grand' else ' and logits'}")
    if epoch is None:
        epoch = recipe.epochs if events else max(1, round(recipe.epochs / 10))
    if runs < 1 or not int(events) <= epoch <= recipe.epochs:
        raise SettingError(
            f"runs= is at least 1 and epoch= lies between {int(events)} and {recipe.epochs}"
        )
    return epoch, content_key([
        "difficulty", __version__, problem.recipe_key(), problem.train.fingerprint(),
        score, epoch, runs, runtime.seed, runtime.device,
    ])  # fmt: skip


def recipe_of(problem: Problem) -> SupervisedRecipe:
    """The recipe of a problem, if trainings can be stopped and watched.

    Raises:
        NeedsError: they cannot.
    """
    if not isinstance(problem.recipe, SupervisedRecipe):
        raise NeedsError(
            "difficulty needs trainings that stop at any epoch; pass recipe=xp.ClassifierRecipe(…)"
        )
    return problem.recipe


def train_on(problem: Problem, ids: Tensor, seed: int, runtime: Runtime | None = None) -> nn.Module:
    """Train on a part of the data with as many steps as a training on all of it takes.

    Learning rates are those of the whole training, step by step; fewer samples are only seen more
    often. With all samples it is the recipe itself, to the bit.

    Args:
        problem: must have a recipe.
        ids: samples to train on, at least one.
        seed: of initialisation and of batch order.
        runtime: device and progress.

    Returns:
        The model, in eval mode.
    """
    recipe = recipe_of(problem)
    if not len(ids):
        raise UserError("there is no sample to train on")
    steps = -(-len(problem.train) // recipe.batch_size)
    return recipe.train(ids.sort().values, seed, runtime, steps=steps)[0]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors [n], −1 … 1; 0 where one of them is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(v.numpy()) - (len(v) + 1) / 2 for v in (a, b))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


def _rows(
    problem: Problem,
    recipe: SupervisedRecipe,
    score: str,
    ids: Tensor,
    runs: int,
    epoch: int,
    runtime: Runtime,
) -> Iterator[tuple[int, Tensor]]:
    """Number and scores [N] of one training after the other, as they are ready."""
    seeds = [runtime.seed_for("difficulty", run) for run in range(runs)]
    runtime.cost.gradients += runs * epoch * len(ids)
    if score == "forgetting":
        for run, seed in enumerate(seeds):
            events = ForgettingEvents(ids)
            recipe.train(ids, seed, runtime, last=epoch, watch=events.watch)
            yield run, events.counts()
    elif score == "forgetting-clean":
        for run, seed in enumerate(seeds):
            events = ForgettingEvents(ids)
            model, states = recipe.train(
                ids, seed, runtime, last=epoch, snapshots=range(1, epoch + 1)
            )
            for state in states:
                model.load_state_dict(state)
                margin = score_model("max-margin", problem, model, ids, runtime)
                events.see(ids, margin < 0)
            yield run, events.counts()
    elif not epoch:
        for run, seed in enumerate(seeds):
            yield run, score_model(score, problem, recipe.initial(seed), ids, runtime)
    else:  # only these need nothing but the model at the end
        short = copy.copy(problem)
        short.recipe = Stopped(recipe, epoch)
        jobs = [Job(ids, seed, "checkpoint") for seed in seeds]
        for done in chosen(None, runtime).run(short, jobs, runtime):
            yield done.index, score_model(score, problem, done.model, ids, runtime)


def _input_lengths(data: Data, ids: Tensor) -> Tensor:
    """Euclidean length [n] of each input, over all its tensors."""

    def squares(x: Tensor) -> Tensor:
        return x.double().flatten(1).square().sum(1)

    parts = []
    for batch in data.batches(256, ids):
        tensors = [batch.x] if isinstance(batch.x, Tensor) else list(batch.x.values())
        parts.append(torch.stack([squares(t) for t in tensors]).sum(0).sqrt())
    return torch.cat(parts)


def _notes(score: str, epoch: int) -> Iterator[str]:
    if not epoch:
        yield (
            "untrained networks say next to nothing about the samples; "
            "grand at initialisation mostly measures the length of the input"
        )
    if score.startswith("forgetting"):
        yield "a sample that is never right in one training has an infinite mean"
