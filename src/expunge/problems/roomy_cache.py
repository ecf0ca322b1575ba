"""Keys and values that grow into spare room, in place of being copied whole at every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

SPARE = 64
"""Tokens that the room grows by."""


class RoomyLayer(DynamicLayer):
    """Keys and values [B, H, T, d] at the front of larger tensors.

    `keys` and `values` may be replaced from outside; new room is then made at the next token.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the states [B, H, t, d] of new tokens; all states so far."""
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._grown("keys", self.keys, key_states)
        self.values = self._grown("values", self.values, value_states)
        return self.keys, self.values

    def _grown(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        before, after = old.shape[2], old.shape[2] + new.shape[2]
        room = self._rooms.get(name)
        if room is None or not _front(old, room) or after > room.shape[2]:
            room = self._rooms[name] = old.new_empty(*old.shape[:2], after + SPARE, old.shape[3])
            room[:, :, :before] = old
        room[:, :, before:after] = new
        return room[:, :, :after]


def _front(part: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is the beginning of another, in the same memory."""
    return part.data_ptr() == whole.data_ptr() and part.stride() == whole.stride()


def roomy(model: nn.Module, cache: Any) -> bool:
    """Give a cache room to grow.

    Args:
        model: that made the cache.
        cache: of `transformers`; changed in place.

    Returns:
        Whether it is plain keys and values, of a model that remembers nothing else of its rows; if not,
        it is left as it was.
    """
    layers = getattr(cache, "layers", [])
    plain = all(type(layer) in (DynamicLayer, RoomyLayer) for layer in layers)
    if not (plain and layers and isinstance(model, PreTrainedModel)):
        return False
    cache.layers = [
        RoomyLayer(layer.keys, layer.values)
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
        else layer
        for layer in layers
    ]
    return True
