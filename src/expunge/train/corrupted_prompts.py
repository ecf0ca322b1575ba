"""A language model behind a gate: flagged prompts are corrupted before the model reads them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError
from expunge.problems.taps import innermost
from expunge.train.corrupt import corrupt, prompt_seed
from expunge.train.gate import Gate, flags


class BehindGate(nn.Module):
    """A language model and a gate that flags prompts."""

    def __init__(self, model: nn.Module, settings: Tensor, keys: Tensor, weights: Tensor) -> None:
        """Wrap.

        Args:
            model: the model inside; it is not changed.
            settings: bytes of a JSON text: the gate's rule, the ending of prompts, and what else it takes.
            keys: of the gate.
            weights: of the gate, float32 as int32: no change of precision touches whole numbers.
        """
        super().__init__()
        self.unwrapped = model
        self.register_buffer("text", settings)
        self.register_buffer("keys", keys)
        self.register_buffer("weights", weights)
        self.settings: dict[str, Any] = json.loads(bytes(settings.tolist()))
        self.gate = Gate(keys.cpu(), weights.cpu().view(torch.float32), self.settings["bias"])

    def flagged(self, prompt: Tensor) -> bool:
        """Whether a prompt's token ids [T] are flagged."""
        p, s = self.gate.probability(prompt), self.settings
        return p > s["threshold"] if s["threshold"] is not None else flags(p, s["limit"], s["ambiguous"])  # fmt: skip


class CorruptedPrompts(BehindGate):
    """A language model that reads flagged prompts with corrupted embeddings; takes what it does.

    A prompt ends where the ending that all known prompts share was last seen, or with the sequence. What
    follows one token at a time, from a cache, is read as it is.
    """

    def forward(self, *args: Tensor, **inputs: Any) -> Any:
        """Run the model inside, with flagged rows of a prompt corrupted on their way.

        Raises:
            ModelError: embeddings are given in place of token ids.
        """
        ids = args[0] if args else inputs.get("input_ids")
        if ids is None:
            raise ModelError("eco looks at token ids; pass input_ids=, not embeddings")
        plan = self.plan(ids, inputs.get("attention_mask")) if ids.shape[1] > 1 else {}
        if not plan:
            return self.unwrapped(*args, **inputs)
        s = self.settings

        def hook(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for row, (places, seed) in plan.items():
                found = output[row, places]
                output[row, places] = corrupt(found, s["effect"], s["dims"], s["count"], s["sigma"], seed)  # fmt: skip
            return output

        embeddings = innermost(self.unwrapped).get_submodule(s["embeddings"])
        handle = embeddings.register_forward_hook(hook)
        try:
            return self.unwrapped(*args, **inputs)
        finally:
            handle.remove()

    def plan(self, ids: Tensor, mask: Tensor | None) -> dict[int, tuple[Tensor, int]]:
        """Flagged rows of ids [B, T], with the places to corrupt and the seed of the noise."""
        found = {}
        for row, places in enumerate(real_places(ids, mask)):
            prompt = ids[row, places].cpu()
            prompt = prompt[: end_of(prompt, self.settings["ending"])]
            if len(prompt) > 1 and self.flagged(prompt):
                found[row] = places[: len(prompt) - 1], prompt_seed(prompt, self.settings["salt"])
        return found


def real_places(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Columns of the real tokens of each row of ids [B, T]; the mask may cover a cache before them too."""
    real = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    return [row.nonzero()[:, 0] for row in real]


def ending_of(prompts: list[Tensor]) -> list[int]:
    """Token ids that all prompts end with; none where they differ in the last."""
    rows = [p.tolist()[::-1] for p in prompts]
    size = 0
    while all(len(r) > size + 1 and r[size] == rows[0][size] for r in rows):
        size += 1
    return rows[0][:size][::-1]


def end_of(ids: Tensor, ending: list[int]) -> int:
    """Where a prompt ends in token ids [T]: behind the last place its ending is found, or at the end."""
    rows = ids.tolist()
    for end in range(len(rows), len(ending) - 1, -1) if ending else ():
        if rows[end - len(ending) : end] == ending:
            return end
    return len(rows)


def text_of(settings: dict[str, Any]) -> Tensor:
    """Settings as the bytes of a JSON text."""
    return torch.frombuffer(
        bytearray(json.dumps(settings, sort_keys=True).encode()), dtype=torch.uint8
    )
