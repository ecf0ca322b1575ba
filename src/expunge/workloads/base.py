"""Workload: a small real problem with its recipe, its usual request and settings tuned for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.data import Data
from expunge.core.errors import ModelError
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime, random_restored
from expunge.problems.classification import Classification
from expunge.train.recipe import SupervisedRecipe


@dataclass(frozen=True)
class Splits:
    """Training, test and (where there is some) validation data."""

    train: Data
    test: Data
    valid: Data | None = None


@dataclass(frozen=True)
class Workload:
    """A bundled problem.

    Attributes:
        name: kebab-case name.
        title: one line for listings.
        data: reads the data.
        recipe: makes the recipe from the training data.
        request: what is usually asked to be forgotten.
        tuned: settings per method, found on `tuning`, never on `request`.
        tuning: how and on which other request they were found.
        package: what has to be installed, as a pip requirement.
        of: makes the problem of a model and its data; takes the keyword arguments of `Problem`.
    """

    name: str
    title: str
    data: Callable[[], Splits]
    recipe: Callable[[Data], SupervisedRecipe]
    request: Request
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tuning: str = ""
    package: str = "expunge"
    of: Callable[..., Problem] = Classification

    def problem(
        self,
        seed: int = 0,
        *,
        weights: Mapping[str, Tensor] | None = None,
        runtime: Runtime | None = None,
    ) -> Problem:
        """Build the problem with its original model.

        Args:
            seed: seed of the original's training.
            weights: the original's weights, if they were trained before; else it is trained now.
            runtime: device and progress of that training.

        Returns:
            The problem.
        """
        splits = self.data()
        recipe = self.recipe(splits.train)
        model: nn.Module
        if weights is None:
            model = recipe(splits.train.ids, seed, runtime)
        else:
            model = recipe.build()
            model.load_state_dict(dict(weights))
        return self.of(
            model,
            splits.train,
            splits.test,
            valid=splits.valid,
            recipe=recipe,
            name=self.name,
            source={"kind": "workload", "workload": self.name, "seed": seed},
            tuned=self.tuned,
        )

    def untrained(self, seed: int = 0) -> Problem:
        """The problem around a network that its recipe could start from, for what trains by itself.

        Args:
            seed: of the network's weights; the same one gives the same network.
        """
        recipe = self.recipe(self.data().train)
        with random_restored():
            torch.manual_seed(seed)
            made = self.problem(seed, weights=recipe.build().state_dict())
        made.source["untrained"] = True
        return made

    def describe(self) -> dict[str, Any]:
        """What listings show."""
        return {
            "name": self.name,
            "title": self.title,
            "request": self.request.to_dict(),
            "package": self.package,
            "tuned": {k: dict(v) for k, v in self.tuned.items()},
            "tuning": self.tuning,
        }


def stratified(labels: np.ndarray, parts: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Split positions into parts of the given sizes with the same class shares.

    Args:
        labels: class of each sample [N].
        parts: sizes; they must add up to N.
        seed: of the shuffle.

    Returns:
        Sorted positions of each part.
    """
    from sklearn.model_selection import train_test_split

    rest, result = np.arange(len(labels)), []
    for size in parts[:-1]:
        taken, rest = train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=seed
        )
        result.append(np.sort(taken))
    return [*result, np.sort(rest)]


def original_of(source: Mapping[str, Any]) -> nn.Module:
    """Make the original of a record's `source` again: train it, or leave it untrained as it was."""
    from expunge.workloads import registry

    workload, seed = registry.get(source["workload"]), int(source["seed"])
    return (workload.untrained(seed) if source.get("untrained") else workload.problem(seed)).model


def pruned_original_of(source: Mapping[str, Any]) -> nn.Module:
    """Train and prune the original of a record's `source` of kind `pruned` again.

    Raises:
        ModelError: it was pruned from something else than a bundled workload.
    """
    from expunge.train.prune import Pruning, prune
    from expunge.workloads import registry

    dense, seed = source["of"], int(source["prune_seed"])
    if dense.get("kind") != "workload":
        raise ModelError("this model was pruned; pass the pruned original as model=")
    problem = registry.get(dense["workload"]).problem(int(dense["seed"]))
    return prune(problem, Pruning.create(source["pruning"]), runtime=Runtime(seed=seed)).model
