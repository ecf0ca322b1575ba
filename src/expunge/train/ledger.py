"""The ledger of requests that a gated model holds: what is kept of each, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from expunge.core.errors import NeedsError, RequestError
from expunge.core.outcome import Wrapper
from expunge.train.corrupted_prompts import text_of

NAME = "gated-adapters"
"""Of the wrapper that a ledger makes."""


@dataclass(frozen=True)
class Ledger:
    """What is kept of all requests, in the order they came.

    Attributes:
        common: `base`: hash of the model inside; `layers`: names of the layers whose states detectors
            read; `schedule`: w from which it counts in full, what it is then, and w up to which it
            counts nothing; `shared`: one adapter for all requests; `encoder` and `words`: another
            reader of prompts, if any, and the model's tokenizer to give it texts.
        entries: one a request: its `key`, the hash of its `data`, the `ending` of its prompts, the
            `scale` of its adapter and the weight of the orthogonality penalty, `orthogonal`.
        tensors: one dict a request: `adapter/MODULE/A` [R, in] and `…/B` [out, R], `detector/…`, and
            `encoder/…` where the reader of prompts was adapted to the request.
    """

    common: dict[str, Any]
    entries: tuple[dict[str, Any], ...] = ()
    tensors: tuple[dict[str, Tensor], ...] = ()

    def with_request(self, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Ledger:
        """The ledger with one more request."""
        kept = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        return replace(self, entries=(*self.entries, entry), tensors=(*self.tensors, kept))

    def without(self, key: str) -> Ledger:
        """The ledger without a request, however often it came: nothing of it is left.

        Raises:
            RequestError: it holds no such request.
            NeedsError: all requests share one adapter.
        """
        places = [n for n, entry in enumerate(self.entries) if entry["key"] == key]
        if not places:
            raise RequestError("the model holds no such request; it may have been revoked before")
        if self.common["shared"]:
            raise NeedsError(
                "these requests share one adapter, from which none can be taken out; unlearn with "
                "adapters='each' to be able to revoke"
            )
        rest = [n for n in range(len(self.entries)) if n not in places]
        return replace(
            self,
            entries=tuple(self.entries[n] for n in rest),
            tensors=tuple(self.tensors[n] for n in rest),
        )

    def matrices(self, name: str) -> list[dict[str, Tensor]]:
        """A or B by module of each request's adapter, as far as it is kept."""
        return [
            {n.split("/")[1]: t for n, t in tensors.items() if n.startswith("adapter/") and n.endswith(f"/{name}")}
            for tensors in self.tensors
        ]  # fmt: skip

    def wrapper(self) -> Wrapper:
        """The ledger as a change of the model inside."""
        settings = text_of({"common": self.common, "entries": self.entries})
        tensors = {
            f"{NAME}/{place}/{name}": tensor
            for place, of_request in enumerate(self.tensors)
            for name, tensor in of_request.items()
        }
        return Wrapper({f"{NAME}/settings": settings, **tensors})


def orthogonality(
    earlier: Sequence[Mapping[str, Tensor]], own: Mapping[str, Tensor], blocks: int
) -> Tensor:
    r"""\(\frac1n \sum_{modules} \sum_s \|A_s A_t^\top\|_F^2\), 0 if there is none before.

    Args:
        earlier: A [R, in] by module of each earlier request; constants.
        own: A [R, in] by module of this one.
        blocks: n.
    """
    total = next(iter(own.values())).new_zeros(())
    for one in earlier:
        for module in sorted(one.keys() & own.keys()):
            total = total + (one[module].detach() @ own[module].T).square().sum()
    return total / blocks
