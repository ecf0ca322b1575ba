"""Serving: predictions by the version in force; a switch is one assignment.

Which version is in force stands in the database and is read for every call, so that no answer comes from
superseded weights once a release is visible. A call in progress keeps the module it began with.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError, UserError
from expunge.core.hashing import plain
from expunge.service.errors import NotFound
from expunge.service.service import Service


@dataclass(frozen=True)
class Served:
    """A module and the version it is."""

    version: int
    weights: str
    module: nn.Module


class Serving:
    """Predictions of all models of a service."""

    def __init__(self, service: Service) -> None:
        """Load nothing yet."""
        self._service = service
        self._served: dict[str, Served] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def in_force(self, model: str) -> Served:
        """The module of the version in force, loaded if it is new.

        Raises:
            NotFound: there is no such model.
            ExpungeError: its files cannot be read.
        """
        if model not in self._service.policy.models:
            raise NotFound(f"there is no model {model!r}")
        for last in (False, False, True):
            row = self._service.current(model)
            number = 0 if row is None else int(row["version"])
            held = self._served.get(model)
            if held is not None and held.version == number:
                return held
            with self._lock:
                lock = self._locks.setdefault(model, threading.Lock())
            with lock:
                held = self._served.get(model)
                if held is not None and held.version == number:
                    return held
                deleter, folder = self._service.deleter(model), self._service.current_folder(row)
                try:
                    module = deleter.predictor(folder)
                except (OSError, ExpungeError):
                    if last:
                        raise
                    continue  # superseded and removed meanwhile
                weights = row["weights"] if row is not None else deleter.weights(None)
                served = Served(number, weights, module.eval())
                if held is None or held.version < number:
                    self._served[model] = served
                return served
        raise ExpungeError(f"the version of {model} in force cannot be read")

    def predict(self, model: str, inputs: Sequence[Any], kind: str = "float") -> dict[str, Any]:
        """Outputs for a batch of inputs.

        Args:
            model: its name.
            inputs: nested lists [B, …].
            kind: `float` or `int`, what the numbers are.

        Returns:
            `outputs` as nested lists, `version` and `weights` they come from.

        Raises:
            UserError: the inputs are no array, or not of a shape that the model takes.
        """
        try:
            x = torch.tensor(inputs, dtype=torch.long if kind == "int" else torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError("inputs are nested lists of numbers, all of one shape") from error
        if x.ndim < 1 or not len(x):
            raise UserError("inputs hold no sample")
        served = self.in_force(model)
        return {
            "outputs": self._outputs(served, x), "version": served.version, "weights": served.weights,
        }  # fmt: skip

    @staticmethod
    def _outputs(served: Served, x: Tensor) -> Any:
        try:
            with torch.inference_mode():
                made = served.module(x)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"the model takes no inputs of shape {tuple(x.shape)}") from error
        made = getattr(made, "logits", made)
        return plain(made.float() if isinstance(made, Tensor) else made)
