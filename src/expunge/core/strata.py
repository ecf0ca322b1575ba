"""Strata: named parts of the training samples, by which an audit's findings are broken down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import UserError
from expunge.core.hashing import content_key, hash_tensors


@dataclass(frozen=True)
class Strata:
    """Two or more parts without a common sample; samples outside all of them are left out.

    Attributes:
        parts: sorted ids of each part, by name.
        about: what the parts were made by, for the report.
    """

    parts: Mapping[str, Tensor]
    about: str = ""

    def __post_init__(self) -> None:
        """Sort the ids and check them.

        Raises:
            UserError: fewer than two parts, a name that cannot follow an `@`, or a sample in two parts.
        """
        parts = {n: torch.as_tensor(ids).long().sort().values for n, ids in self.parts.items()}
        object.__setattr__(self, "parts", parts)
        if len(parts) < 2:
            raise UserError("strata= takes at least two parts; without them there is one audit")
        for name in parts:
            if not name or any(c in "@/" or c.isspace() for c in name):
                raise UserError(f"a stratum's name has no blank, '@' or '/', unlike {name!r}")
        every = torch.cat(list(parts.values()))
        if len(every) != len(every.unique()):
            raise UserError("a sample is in two strata; every sample belongs to one at most")

    @classmethod
    def of(cls, given: Any) -> Strata:
        """Strata from themselves, from what has `strata()` (a `Difficulty`), or from `{name: ids}`.

        Raises:
            UserError: it is none of these.
        """
        if isinstance(given, Strata):
            return given
        if callable(getattr(given, "strata", None)):
            return given.strata()
        if isinstance(given, Mapping):
            return cls(given)
        raise UserError("strata= takes the result of difficulty(), or ids by name of the stratum")

    def key(self) -> str:
        """Content key: names and ids."""
        return content_key([list(self.parts), hash_tensors(self.parts)])

    def describe(self, forget: Tensor) -> dict[str, Any]:
        """What a comparison says of them: what they are by, and samples of each part to forget."""
        sizes = {n: int(torch.isin(ids, forget).sum()) for n, ids in self.parts.items()}
        return {"about": self.about, "forget": sizes}
