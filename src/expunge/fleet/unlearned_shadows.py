"""Run an unlearning method on shadow models: what each says before, after, and retrained instead.

Each model sees a random half of a pool of samples and a random half of all others. Halves of the pool
are exact: were their sizes random, a model that saw one sample would have seen, and would lose, more of
the others too, and its size would tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from expunge.core.errors import UnchangedError
from expunge.core.hashing import content_key
from expunge.core.method import Method, unlearn
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.fleet.asked import Answer, ask_many
from expunge.fleet.jobs import Job, random_masks
from expunge.fleet.shadows import SHARE, odds_of

if TYPE_CHECKING:
    from expunge.store import Store


class Plan(NamedTuple):
    """Who is in which model and who is forgotten.

    Attributes:
        keeps: ids of each model's training.
        inside: which of the pool's samples are in it, bool [K, P].
        forgot: which of them a run forgets, bool [K·R, P], the runs of one model one after the other.
    """

    keeps: list[Tensor]
    inside: Tensor
    forgot: Tensor


def plan(
    problem: Problem, pool: Tensor, models: int, draws: int, share: float, runtime: Runtime
) -> Plan:
    """Draw the halves, and what each run forgets.

    Args:
        problem: gives the training data.
        pool: sorted ids [P] of training samples that are forgotten where they were seen.
        models: K.
        draws: runs a model, R.
        share: of the pool's samples in a model's training that a run forgets, at least one.
        runtime: seeds.

    Returns:
        The plan; it depends on no method.
    """
    rest = problem.train.without(pool)
    if len(pool) > 1:
        inside = random_masks(models, len(pool), SHARE, runtime)
    else:
        inside = torch.zeros(models, 1, dtype=torch.bool)
        inside[torch.randperm(models, generator=runtime.generator("subset"))[: models // 2]] = True
    others = random_masks(models, len(rest), SHARE, replace(runtime, seed=runtime.seed_for("rest")))
    keeps = [
        torch.cat([pool[a], rest[b]]).sort().values for a, b in zip(inside, others, strict=True)
    ]
    forgot = torch.zeros(models * draws, len(pool), dtype=torch.bool)
    for row in range(models * draws):
        there = inside[row // draws].nonzero().flatten()
        count = max(1, round(share * len(there))) if len(there) else 0
        generator = runtime.generator("forget draw", row)
        forgot[row, there[torch.randperm(len(there), generator=generator)[:count]]] = True
    return Plan(keeps, inside, forgot)


def run_on_shadows(
    problem: Problem,
    pool: Tensor,
    method: Method | None,
    drawn: Plan,
    runtime: Runtime,
    store: Store | None = None,
    key: str = "",
) -> dict[str, Tensor]:
    """Train models and make each forget what the plan says.

    Models are not kept: each is trained, asked, made to forget, asked again and dropped.

    Args:
        problem: with recipe, labels and logits.
        pool: ids [P] that are asked about.
        method: what is run; None leaves the models as they are.
        drawn: the plan.
        runtime: seeds, device and progress.
        store: where what each model said is looked up and kept.
        key: content key of all this.

    Returns:
        `before` [K, P] and `after` [K·R, P]: log-odds of the true label; `kept_before` [K] and
        `kept_after` [K·R]: accuracies on the training samples that a run keeps.

    Raises:
        ExpungeError: a training or the method failed; what was said before is kept.
    """
    draws = len(drawn.forgot) // len(drawn.keeps)

    def ask(k: int, model: nn.Module) -> Answer:
        seen = drawn.keeps[k]
        after: list[Tensor] = []
        right: list[float] = []
        for row in range(k * draws, (k + 1) * draws):
            gone = pool[drawn.forgot[row]]
            rest = seen[~torch.isin(seen, gone)]
            if not right:
                before = odds_of(problem, model, problem.train, runtime, pool)
                right.append(_accuracy(problem, model, rest, runtime))
            done = model
            if method is not None and len(gone):
                done = _unlearned(problem, model, seen, gone, method, runtime, row)
            after.append(odds_of(problem, done, problem.train, runtime, pool))
            right.append(_accuracy(problem, done, rest, runtime))
        return {
            "before": before[None], "after": torch.stack(after),
            "kept_before": torch.tensor(right[:1]), "kept_after": torch.tensor(right[1:]),
        }  # fmt: skip

    jobs = [
        Job(keep, runtime.seed_for("unlearned shadow", k)) for k, keep in enumerate(drawn.keeps)
    ]
    said = ask_many(
        problem, jobs, ask, runtime, kind="unlearned-shadow", task="shadow models",
        keys=[content_key([key, k]) for k in range(len(jobs))], store=store,
    )  # fmt: skip
    return {name: torch.cat([s[name] for s in said]) for name in said[0]}


def retrained_shadows(
    problem: Problem,
    pool: Tensor,
    drawn: Plan,
    runtime: Runtime,
    store: Store | None = None,
    key: str = "",
) -> dict[str, Tensor]:
    """What models trained without what each one's first run forgets say: `retrained` [K, P]."""
    draws = len(drawn.forgot) // len(drawn.keeps)
    jobs = [
        Job(
            keep[~torch.isin(keep, pool[drawn.forgot[k * draws]])],
            runtime.seed_for("retrained shadow", k),
        )
        for k, keep in enumerate(drawn.keeps)
    ]
    said = ask_many(
        problem, jobs, lambda _, model: {"odds": odds_of(problem, model, problem.train, runtime, pool)},
        runtime, kind="retrained-shadow", task="shadow models, retrained",
        keys=[content_key([key, k]) for k in range(len(jobs))], store=store,
    )  # fmt: skip
    return {"retrained": torch.stack([s["odds"] for s in said])}


def _unlearned(
    problem: Problem,
    model: nn.Module,
    seen: Tensor,
    gone: Tensor,
    method: Method,
    runtime: Runtime,
    row: int,
) -> nn.Module:
    """The model after a method has forgotten some of what it has seen."""
    own = problem.about(model.cpu(), problem.train.only(seen))
    inner = replace(
        runtime, seed=runtime.seed_for("unlearn a shadow", row), checkpoint=None, cost=Cost()
    )
    try:
        return unlearn(own, Request(ids=tuple(gone.tolist())), method, runtime=inner).runnable()
    except UnchangedError:  # then that is what it does
        return model


@torch.no_grad()
def _accuracy(problem: Problem, model: nn.Module, ids: Tensor, runtime: Runtime) -> float:
    compute = problem.capability("logits")
    model = model.to(runtime.device).eval()
    right = 0
    for batch in problem.train.batches(512, ids):
        logits = compute(model, batch.to(runtime.device)).cpu()
        right += int((logits.argmax(1) == batch.y).sum())
        runtime.cost.samples += len(batch)
    return right / max(1, len(ids))
