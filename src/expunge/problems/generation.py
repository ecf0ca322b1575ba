"""Generation in batches with a key–value cache: greedy, or drawn at a temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    tokens: int,
    ends: Sequence[int],
    filler: int = 0,
    batch_size: int = 16,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[Tensor]:
    r"""Continue prompts greedily, or with tokens drawn from \(\mathrm{softmax}(z / T)\).

    Prompts of similar length share a batch, padded on the left; a batch ends when all of it has.

    Args:
        model: a transformers model; its mode is restored.
        prompts: token ids [T] of each prompt.
        tokens: largest number of new tokens.
        ends: token ids that end a text; they are not in the result.
        filler: token id of the padding, which no token attends to.
        batch_size: prompts at a time.
        temperature: T; 0 takes the most likely token.
        seeds: one a prompt, if T > 0: what is drawn for a prompt depends on its own seed only.

    Returns:
        New token ids of each prompt, in the order given.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    found: dict[int, Tensor] = {}
    draws = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature > 0 else []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            pick = _Pick(temperature, [draws[p] for p in places] if draws else [])
            new = _continue([prompts[p] for p in places], model, tokens, ends, filler, device, pick)
            found |= dict(zip(places, new, strict=True))
    finally:
        model.train(training)
    return [found[n] for n in range(len(prompts))]


class _Pick:
    """Chooses the next token [B, 1] from logits [B, V]."""

    def __init__(self, temperature: float, draws: Sequence[torch.Generator]) -> None:
        self.temperature, self.draws = temperature, draws

    def __call__(self, logits: Tensor) -> Tensor:
        if not self.draws:
            return logits.argmax(-1, keepdim=True)
        reached = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        levels = torch.stack([torch.rand((), generator=g, dtype=torch.double) for g in self.draws])
        found = torch.searchsorted(reached, levels.to(logits.device)[:, None], right=True)
        return found.clamp(max=logits.shape[-1] - 1)


def _continue(
    prompts: list[Tensor],
    model: nn.Module,
    tokens: int,
    ends: Sequence[int],
    filler: int,
    device: torch.device,
    pick: _Pick,
) -> list[Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), filler)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    stops = torch.tensor(list(ends), device=device, dtype=torch.long)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, open_, said = None, torch.ones(len(prompts), dtype=torch.bool, device=device), []
    for _ in range(tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=places,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        ids = pick(output.logits[:, -1])
        open_ &= ~torch.isin(ids[:, 0], stops)
        if not bool(open_.any()):
            break
        said.append(torch.where(open_, ids[:, 0], -1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        places = places[:, -1:] + 1
    if not said:
        return [torch.zeros(0, dtype=torch.long) for _ in prompts]
    rows = torch.stack(said, 1).cpu()
    return [row[row >= 0] for row in rows]
