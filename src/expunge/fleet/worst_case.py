r"""The forget set that is hardest, or easiest, to unlearn: a search over weights of the samples.

\[ \min_{w \in S} f(w) = \sum_i w_i\,\ell(\theta_u(w); z_i) + \gamma\|w\|_2^2, \qquad
   S = \{0 \le w \le 1,\ \textstyle\sum_i w_i = m\} \]

where \(\theta_u(w)\) minimises \(\sum_i (1 - w_i)\,\ell(\theta; z_i)\), i.e. unlearns what w marks. A low loss on
what was "forgotten" says that unlearning left no trace of it there: such samples are *redundant*, since the
others teach the same. Maximised, f finds those that others do not teach: *memorised* ones. The two are the
tails of one scale and neither is "the" worst case: the first is where forgetting cannot be seen, the second
where privacy is at risk.

After "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning" (Fan et al. 2024, arXiv
2403.07362). Steps of the lower level are \(-\eta\,\mathrm{sign}(\nabla)\), so \(\mathrm{d}\theta_u/\mathrm{d}w = 0\) almost
everywhere and \(\nabla_w f = \ell + 2\gamma w\) is all there is. It differs from the released code, on purpose: upper
losses are taken in eval mode and without gradients; the step of the upper level follows the losses (there a
fixed 0.01 leaves w where it began); samples with \(w_i = 1\) are left out of the lower level's batches and
so out of batch statistics too; a class's gradient is its mean loss, and signs of zero gradients are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from expunge import __version__
from expunge.core.data import Data, look_up
from expunge.core.errors import ExpungeError, NeedsError, SettingError
from expunge.core.hashing import content_key, hash_model, hash_tensors
from expunge.core.problem import Problem
from expunge.core.pruned import kept_of
from expunge.core.request import Request, forget
from expunge.core.runtime import Runtime, random_restored
from expunge.core.settings import Configured, setting
from expunge.train.box_simplex import Groups, largest, projected
from expunge.train.norm import norm_layers

if TYPE_CHECKING:
    from expunge.store import Store

By = Literal["sample", "class"]


@dataclass(frozen=True)
class WorstCase:
    """What the search found.

    Attributes:
        by: whether units are samples or whole classes.
        units: ids of the samples, or labels of the classes, in ascending order [U].
        weights: of the units, float32 [T + 1, U]: the random start, then after each round.
        objective: mean loss of what is marked, after unlearning it, before each round and at the end,
            in nats [T + 1]; the first is that of the random start, the last that of the set found.
        rate: step of the upper level.
        reverse: whether f was maximised.
        size: m, how many units.
    """

    by: By
    units: Tensor
    weights: Tensor
    objective: tuple[float, ...]
    rate: float
    reverse: bool
    size: int

    @property
    def tail(self) -> str:
        """Which end of the scale it is: `redundant` or `memorised`."""
        return "memorised" if self.reverse else "redundant"

    @property
    def found(self) -> Tensor:
        """Ids or labels found, sorted [m]."""
        return self._marked(-1)

    @property
    def start(self) -> Tensor:
        """Ids or labels of the random start, sorted [m]."""
        return self._marked(0)

    def _marked(self, round_: int) -> Tensor:
        return self.units[self.weights[round_] > 0.5]  # both ends are whole

    def request(self, reason: str = "") -> Request:
        """The request to forget what was found.

        Args:
            reason: kept with the request; which tail it is by default.
        """
        why = (
            reason
            or f"{self.tail} tail, searched: {'easiest' if self.reverse else 'hardest'} to unlearn"
        )
        values = self.found.tolist()
        return forget(**{"label" if self.by == "class" else "ids": tuple(values)}, reason=why)


@dataclass(frozen=True)
class Search(Configured):
    """Settings of the search."""

    unlearner: Literal["finetune", "retrain"] = setting(
        "finetune", "what each round unlearns from: the original, or an untrained network"
    )
    rounds: int = setting(20, "rounds of the upper level", low=1, source="released configuration")
    epochs: int = setting(2, "passes of the lower level a round", low=1, source="README")
    lr: float = setting(
        1e-3, "η: how far a sign step moves each weight; small networks want less", above=0, source="README"
    )  # fmt: skip
    rate: float | None = setting(
        None, "step of the upper level; None: 1 / (rounds · median of the first round's positive losses)", low=0,
        source="the released 0.01 leaves w where it began",
    )  # fmt: skip
    gamma: float = setting(1e-4, "γ", low=0, source="released scripts")
    binarise: int = setting(
        20, "rounds after which w becomes its largest m; the last always does", low=1, source="code"
    )
    batch_size: int = setting(128, "samples a step of the lower level", low=1)


def worst_case(
    problem: Problem,
    size: int,
    *,
    reverse: bool = False,
    by: By = "sample",
    balanced: bool = False,
    among: Tensor | Sequence[int] | None = None,
    clean: Data | None = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
    **settings: Any,
) -> WorstCase:
    """Search the forget set that is hardest to unlearn (redundant), or easiest (memorised).

    Args:
        problem: the original model and its training data, with labels.
        size: samples to find, or classes.
        reverse: find the easiest instead.
        by: choose samples or whole classes.
        balanced: of each class as many samples as its share of those to choose among (largest remainders).
        among: ids to choose among; all by default. The others only take part in training.
        clean: the training samples without augmentation, for the upper level, where `problem.train`
            augments what it reads.
        store: where the search is kept and looked up.
        runtime: seed, device and progress.
        **settings: of `Search`: `lr=`, `rounds=`, `unlearner=`, …

    Returns:
        What was found, with every round's weights and objective.

    Raises:
        NeedsError: there are no labels, or nobody knows how to build a network to retrain.
        SettingError: a setting is not possible, or there are not so many samples.
        ExpungeError: a loss is not finite.
    """
    how, runtime = Search.create(settings), runtime or Runtime()
    seen = problem.train if clean is None else clean
    if not (problem.train.labelled and seen.labelled):
        raise NeedsError(
            "a search for forget sets reads losses, and the training data has no labels"
        )
    problem.check()
    ids = problem.train.ids.sort().values
    among = None if among is None else chosen_among(problem.train, among)
    units, owner, groups = _units(problem.train, ids, size, by, balanced, among)
    seen.positions(ids)  # complain before any work
    key = content_key([
        "worst-case", __version__, problem.fingerprint(), size, reverse, by, balanced, how.in_force(),
        _begun_with(problem, how), None if among is None else hash_tensors({"ids": among}),
        None if clean is None else clean.fingerprint(), runtime.describe(),
    ])  # fmt: skip
    kept = None if store is None else store.find("worst-case", key)
    if store is not None and kept is not None:
        past, trace = kept.record, store.tensors(kept)["weights"]
        return WorstCase(by, units, trace, tuple(past["objective"]), past["rate"], reverse, size)
    with runtime.metered(), runtime.task(f"search: {size} to forget", how.rounds + 1) as task:

        def losses(w: Tensor, number: int) -> Tensor:
            found = _after(problem, ids, w[owner], seen, how, number, runtime)
            task.advance()
            return torch.zeros_like(w).index_add(0, owner, found) / owner.bincount()

        weights, objective, rate = _descend(losses, len(units), groups, size, how, reverse, runtime)
    result = WorstCase(by, units, weights.float(), objective, rate, reverse, size)
    if store is not None:
        record = {
            "problem": problem.name, "tail": result.tail, "size": size, "by": by, "balanced": balanced,
            "settings": how.in_force(), "rate": rate, "objective": list(objective),
        }  # fmt: skip
        store.put_run(
            kind="worst-case", key=key, record=record, tensors={"weights": result.weights}
        )
    return result


def chosen_among(data: Data, among: Tensor | Sequence[int]) -> Tensor:
    """Ids to choose among: sorted, each once.

    Raises:
        RequestError: one is not in the data.
    """
    ids = torch.as_tensor(among, dtype=torch.long).unique()
    data.positions(ids)
    return ids


def _begun_with(problem: Problem, how: Search) -> list[Any]:
    """What else a round depends on: which weights may move, and how an untrained network is built."""
    if how.unlearner == "retrain":
        untrained = problem.fresh(0)
        return [_free(untrained), hash_model(untrained), hash_model(problem.fresh(1))]
    return [_free(problem.model)]


def _free(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def _descend(
    losses: Callable[[Tensor, int], Tensor],
    count: int,
    groups: Groups,
    size: int,
    how: Search,
    reverse: bool,
    runtime: Runtime,
) -> tuple[Tensor, tuple[float, ...], float]:
    """The upper level: weights [T + 1, U] of all rounds, their objectives, and the step in force."""
    w = _random(groups, count, runtime.generator("worst-case", "start"))
    free = torch.cat([places for places, _ in groups])
    trace, objective, rate = [w], [], how.rate
    for number in range(how.rounds):
        found = losses(w, number)
        objective.append(float(w @ found) / size)
        if rate is None:
            positive = found[free][found[free] > 0]
            rate = 1 / (how.rounds * float(positive.median())) if len(positive) else 1.0
        step = rate * gradient(found, w, how.gamma)
        if not bool(step.isfinite().all()):
            raise SettingError("the weights cannot be moved so far; lower rate or gamma")
        w = projected(w + step if reverse else w - step, groups)
        if (number + 1) % how.binarise == 0 or number + 1 == how.rounds:
            w = largest(w, groups)
        trace.append(w)
    objective.append(float(w @ losses(w, how.rounds)) / size)
    assert rate is not None
    return torch.stack(trace), tuple(objective), rate


def _after(
    problem: Problem,
    ids: Tensor,
    marked: Tensor,
    seen: Data,
    how: Search,
    number: int,
    runtime: Runtime,
) -> Tensor:
    """The lower level: loss [N] of each sample after unlearning what w marks."""
    if how.unlearner == "finetune":
        model = copy.deepcopy(problem.model)
    else:
        model = problem.fresh(runtime.seed_for("worst-case", "fresh", number))
    model = model.to(runtime.device)
    with random_restored():  # for what draws within the network
        torch.manual_seed(runtime.seed_for("worst-case", number))
        sign_descent(
            model, problem, ids, 1 - marked, epochs=how.epochs, lr=how.lr, batch_size=how.batch_size,
            order=lambda epoch: runtime.generator("worst-case", number, epoch), runtime=runtime,
        )  # fmt: skip
    found = each_loss(model, problem, seen, ids, runtime)
    if not bool(found.isfinite().all()):
        raise ExpungeError("a loss is not finite after unlearning with sign steps; lower lr")
    return found


def sign_descent(
    model: nn.Module,
    problem: Problem,
    ids: Tensor,
    weights: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    order: Callable[[int], torch.Generator],
    runtime: Runtime,
) -> None:
    r"""\(\theta \leftarrow \theta - \eta\,\mathrm{sign}(\nabla_\theta \sum_{i \in B} v_i\,\ell_i)\), in place, in train mode.

    Samples without weight are not read, so that they leave no trace in batch statistics either.

    Args:
        model: on the runtime's device; in eval mode afterwards. What was pruned stays zero.
        problem: gives training data and loss.
        ids: sorted ids [N].
        weights: v ≥ 0 of their losses [N].
        epochs: passes over the samples.
        lr: η.
        batch_size: samples a step; a single one that is left over is passed over where there is batch norm.
        order: gives the generator that shuffles an epoch.
        runtime: device and counters.
    """
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stays = {n: m.to(runtime.device) for n, m in (kept_of(model) or {}).items()}
    fewest = 2 if norm_layers(model) else 1
    active = ids[weights > 0]
    model.train()
    for epoch in range(epochs):
        for batch in problem.train.batches(batch_size, active, order(epoch)):
            if len(batch) < fewest:
                continue
            v = weights[look_up(ids, batch.ids)[0]].to(runtime.device)
            each = problem.each_loss(model, batch.to(runtime.device))
            gradients = torch.autograd.grad(
                (v.to(each.dtype) * each).sum(), list(moving.values()), allow_unused=True
            )
            with torch.no_grad():
                for (name, p), gradient in zip(moving.items(), gradients, strict=True):
                    if gradient is not None:
                        direction = gradient.sign()
                        p.sub_(lr * (direction * stays[name] if name in stays else direction))
            runtime.cost.samples += len(batch)
            runtime.cost.gradients += len(batch)
    model.eval()


@torch.no_grad()
def each_loss(
    model: nn.Module, problem: Problem, data: Data, ids: Tensor, runtime: Runtime
) -> Tensor:
    """Loss [n] of each sample in eval mode, double precision on CPU, in nats."""
    model.eval()
    runtime.cost.samples += len(ids)
    parts = [
        problem.each_loss(model, batch.to(runtime.device)).double().cpu()
        for batch in data.batches(512, ids)
    ]
    return torch.cat(parts)


def gradient(losses: Tensor, w: Tensor, gamma: float) -> Tensor:
    r"""\(\nabla_w f = \ell + 2\gamma w\) [U]: sign steps let no derivative through."""
    return losses + 2 * gamma * w


def shares(labels: Tensor, size: int) -> dict[int, int]:
    """How many of `size` samples come from each class of labels [n]: its share, by largest remainders."""
    names, counts = labels.unique(return_counts=True)
    exact = counts.double() * size / len(labels)
    whole = exact.floor().long()
    more = torch.argsort(exact - whole, descending=True, stable=True)[: size - int(whole.sum())]
    whole[more] += 1
    return dict(zip(names.tolist(), whole.tolist(), strict=True))


def _units(
    data: Data, ids: Tensor, size: int, by: By, balanced: bool, among: Tensor | None
) -> tuple[Tensor, Tensor, Groups]:
    """Units [U], the unit of each sample [N], and what is projected together."""
    if by not in get_args(By):
        raise SettingError(f"by is sample or class, not {by!r}")
    if balanced and by == "class":
        raise SettingError("balanced= is for samples; whole classes cannot be balanced")
    free = torch.ones(len(ids), dtype=torch.bool)
    if among is not None:
        free = torch.isin(ids, among)
    labels = data.labels_of(ids)
    if labels.is_floating_point() and (by == "class" or balanced):
        what = "by=class" if by == "class" else "balanced="
        raise SettingError(f"{what} is about classes, and the labels are no class numbers")
    if by == "class":
        units, owner = labels.unique(return_inverse=True)
        # a class of which some samples are barred is barred
        barred = torch.zeros(len(units), dtype=torch.bool).index_put(
            (owner[~free],), torch.tensor(True)
        )
        groups = [((~barred).nonzero().flatten(), size)]
    else:
        units, owner = ids, torch.arange(len(ids))
        places = free.nonzero().flatten()
        groups = [(places, size)]
    count = len(groups[0][0])
    if size != int(size) or not 0 < size < min(count + 1, len(units)):
        what = "classes" if by == "class" else "samples"
        raise SettingError(f"{size} of {count} {what} cannot be chosen to forget")
    if balanced:
        parts = shares(labels[places], size)
        groups = [(places[labels[places] == c], n) for c, n in parts.items()]
    return units, owner, groups


def _random(groups: Groups, count: int, draw: torch.Generator) -> Tensor:
    w = torch.zeros(count, dtype=torch.double)
    for places, size in groups:
        w[places[torch.randperm(len(places), generator=draw)[:size]]] = 1
    return w
