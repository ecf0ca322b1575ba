"""Fixed ways to corrupt the embeddings of some tokens."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

Effect = Literal["noise", "replace", "zero", "flip", "add", "subtract"]
Dims = Literal["first", "random", "top", "least"]


def prompt_seed(prompt: Tensor, salt: int = 0) -> int:
    """A seed that depends on a prompt's token ids [T]: asking again gives the same noise."""
    text = ",".join(map(str, [salt, *prompt.tolist()]))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def corrupt(
    rows: Tensor, effect: Effect, dims: Dims, count: int | None, sigma: float, seed: int
) -> Tensor:
    """Corrupt embeddings.

    Args:
        rows: of the tokens to corrupt [n, d].
        effect: `noise` adds N(0, σ²), `replace` puts it in place of the value, `zero` and `flip` of
            the sign need no σ, `add` and `subtract` σ itself.
        dims: which coordinates: the `first`, some at `random`, or each token's `top` (largest by
            absolute value, or by value for add and subtract) or `least` ones.
        count: number of coordinates, k; all if None.
        sigma: σ, in the units of the embeddings.
        seed: of noise and of random coordinates.

    Returns:
        New embeddings [n, d].
    """
    size = rows.shape[-1]
    count = size if count is None else min(count, size)
    drawn = torch.Generator().manual_seed(seed)
    noise = sigma * torch.randn(rows.shape, generator=drawn).to(rows)
    chosen = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    if dims == "first":
        chosen[:, :count] = True
    elif dims == "random":
        chosen[:, torch.randperm(size, generator=drawn)[:count].to(rows.device)] = True
    else:
        values = rows if effect in ("add", "subtract") else rows.abs()
        places = values.topk(count, dim=-1, largest=dims == "top").indices
        chosen.scatter_(1, places, True)
    changed = {
        "noise": rows + noise,
        "replace": noise,
        "zero": torch.zeros_like(rows),
        "flip": -rows,
        "add": rows + sigma,
        "subtract": rows - sigma,
    }[effect]
    return torch.where(chosen, changed, rows)
