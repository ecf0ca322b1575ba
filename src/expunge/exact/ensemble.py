"""The model that is served: one plain network a live shard, and the mean of what they say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError


@dataclass(frozen=True)
class Continued:
    """What an ensemble of language models says, with what it takes to go on from there.

    Attributes:
        logits: [B, T, V], the mean.
        past_key_values: keys and values of each member.
    """

    logits: Tensor
    past_key_values: list[Any]


class Ensemble(nn.Module):
    r"""Mean over shards of logits [B, …, C], or \(\log\) of the mean of their softmax.

    It never changes: a deletion makes another one, and predictions under way finish on theirs.
    """

    def __init__(self, members: Sequence[nn.Module], aggregate: str) -> None:
        """Put networks together.

        Args:
            members: one for each live shard, in eval mode.
            aggregate: `logits` or `probabilities`.

        Raises:
            ExpungeError: no shard is alive.
        """
        super().__init__()
        if not members:
            raise ExpungeError(
                "no shard is alive: every first slice has lost a sample; retrain() trains from what is left"
            )
        self.members = nn.ModuleList(members)
        self.aggregate = aggregate
        self.eval()

    def apart(self) -> Ensemble:
        """Another ensemble with these numbers: moved or cast, it leaves this one as it is."""
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), False) for p in self.parameters()}
        memo |= {id(b): b.detach() for b in self.buffers()}
        return copy.deepcopy(self, memo)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Map a member's inputs to the mean [B, …, C].

        With `use_cache=True`, as `CausalLM.generate` asks, to the mean and the keys and values of each
        member, which `past_key_values` takes back.
        """
        if kwargs.get("use_cache"):
            return self._continued(*args, **kwargs)
        outputs = [member(*args, **kwargs) for member in self.members]
        return self._mean([getattr(o, "logits", o) for o in outputs])

    def _continued(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Continued:
        caches = past_key_values or [None] * len(self.members)
        outputs = [
            member(*args, past_key_values=cache, **kwargs)
            for member, cache in zip(self.members, caches, strict=True)
        ]
        return Continued(
            self._mean([o.logits for o in outputs]), [o.past_key_values for o in outputs]
        )

    def _mean(self, outputs: list[Tensor]) -> Tensor:
        found = torch.stack(outputs)
        if self.aggregate == "probabilities":
            return found.log_softmax(-1).logsumexp(0) - torch.log(torch.tensor(len(found)))
        return found.mean(0)
