"""Slice adapters: small maps of a frozen model's weights that can be taken off again."""

from __future__ import annotations

from typing import Any

from expunge.exact.adapters.base import (
    Map,
    SliceAdapter,
    activate,
    active,
    base_hash,
    by_name,
    count,
    effective,
    fitting,
    groups,
    load,
    maps_of,
    merged,
    parameters,
    remove,
    state,
    train_only,
)
from expunge.exact.adapters.lora import LoRA

ADAPTERS: dict[str, Any] = {a.name: a for a in (LoRA,)}
"""Kinds of adapters by the name that a setting gives them."""

__all__ = [
    "ADAPTERS",
    "LoRA",
    "Map",
    "SliceAdapter",
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
    "merged",
    "parameters",
    "remove",
    "state",
    "train_only",
]
