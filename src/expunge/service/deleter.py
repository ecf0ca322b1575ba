"""Deleter: what the service asks of a model, whichever way it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from expunge.core.request import Request

Json = dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """What a request covers, in a model as it is now.

    Attributes:
        ids: samples to delete.
        unknown: what it names that the model was not trained on.
        already: samples it covers that were deleted before.
        outside: what it names that is in the data, but no part of what the model was trained on.
        left: samples that would stay.
    """

    ids: tuple[int, ...]
    unknown: tuple[int | str, ...] = ()
    already: tuple[int, ...] = ()
    outside: tuple[int | str, ...] = ()
    left: int = 1


class Deleter(Protocol):
    """One model: finds what a request covers, prices and carries out its deletion, and looks at the result.

    A version is a folder that a deletion wrote; None stands for the model as it was trained. Nothing
    but `forget` writes, and that only into `target`, so every function can be called again.
    """

    @property
    def evidence(self) -> str:
        """Class of evidence that a deletion by the policy gives: exact, certified, empirical, suppression."""

    def resolve(self, request: Request, version: Path | None) -> Resolved:
        """Find what a request covers.

        Raises:
            RequestError: it cannot be read for this data, or covers nothing.
        """

    def weights(self, version: Path | None) -> str:
        """SHA-256 of the weights of a version."""

    def plan(self, ids: Sequence[int], version: Path | None) -> Json:
        """Say what a deletion takes, as JSON types without ids."""

    def forget(self, ids: Sequence[int], version: Path | None, target: Path, how: str) -> Json:
        """Write the model without `ids` to an empty folder.

        Args:
            ids: samples to delete; none of them was deleted before.
            version: what is in force.
            target: an empty folder on the same file system as the other versions.
            how: `policy`, or `retrain` where the policy escalates.

        Returns:
            `weights` and `weights_before` (SHA-256), `evidence` (exact, certified, empirical,
            suppression), `method`, `settings`, `seconds`, and what else belongs on a certificate; no ids.
        """

    def audit(
        self, ids: Sequence[int], version: Path | None, target: Path, how: str
    ) -> tuple[list[Json], Json]:
        """Measure what `forget` wrote, reloaded from disk.

        Returns:
            Findings with `name`, `value`, `reference`, …; and what else belongs on a certificate:
            `untested`, `references`.
        """

    def predictor(self, version: Path | None) -> Any:
        """A module in evaluation mode that maps a batch of inputs [B, …] to outputs."""

    def verify(self, version: Path) -> list[str]:
        """Sentences on what is wrong with a version's files; none if it is whole."""

    def retire(self, version: Path) -> None:
        """Erase, where the model as it was trained lies, what it still holds of what a version deleted.

        Called once the version is in force; may be called again, and may have nothing to do.
        """
