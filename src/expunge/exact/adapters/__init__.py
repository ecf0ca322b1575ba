"""Slice adapters: small maps of a frozen model's weights that can be taken off again."""

from __future__ import annotations

from typing import Any

from expunge.exact.adapters.base import (
    SliceAdapter,
    activate,
    active,
    base_hash,
    by_name,
    count,
    fitting,
    groups,
    load,
    maps_of,
    merge,
    merged,
    parameters,
    remove,
    state,
    train_only,
)
from expunge.exact.adapters.lora import LoRA
from expunge.exact.adapters.maps import Map, effective
from expunge.exact.adapters.scale_shift import ScaleShift
from expunge.exact.adapters.sparse import SparseMagnitude
from expunge.exact.adapters.tucker import Tucker

ADAPTERS: dict[str, Any] = {a.name: a for a in (LoRA, ScaleShift, Tucker, SparseMagnitude)}
"""Kinds of adapters by the name that a setting gives them."""

__all__ = [
    "ADAPTERS",
    "LoRA",
    "Map",
    "ScaleShift",
    "SliceAdapter",
    "SparseMagnitude",
    "Tucker",
    "activate",
    "active",
    "base_hash",
    "by_name",
    "count",
    "effective",
    "fitting",
    "groups",
    "load",
    "maps_of",
    "merge",
    "merged",
    "parameters",
    "remove",
    "state",
    "train_only",
]
