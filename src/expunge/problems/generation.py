"""Generation in batches with a key–value cache: greedy, or drawn at a temperature.

A batch is kept full: when a quarter of its rows have ended, they leave it and the next prompts take
their places. Where a model's cache cannot be cut and joined, a batch goes on until all of it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import DataError, SettingError
from expunge.problems.turned import TurnedProducts


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    tokens: int,
    ends: Sequence[int],
    filler: int = 0,
    batch_size: int = 64,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    context: int | None = None,
) -> list[Tensor]:
    r"""Continue prompts greedily, or with tokens drawn from \(\mathrm{softmax}(z / T)\).

    Prompts are taken longest first, padded on the left.

    Args:
        model: a transformers model; its mode is restored.
        prompts: token ids [T] of each prompt.
        tokens: largest number of new tokens; 0 gives none.
        ends: token ids that end a text; they are not in the result.
        filler: token id of the padding, which no token attends to.
        batch_size: prompts at a time; up to a quarter more while ended rows wait to leave.
        temperature: T; 0 takes the most likely token.
        seeds: one a prompt, if T > 0: what is drawn for a prompt depends on its own seed only.
        context: most tokens of prompt and continuation together; one is made also behind a prompt that
            fills it.

    Returns:
        New token ids of each prompt, in the order given.

    Raises:
        DataError: a prompt has no tokens.
        SettingError: the temperature is above 0 and there is not one seed for each prompt.
    """
    if temperature > 0 and len(seeds) != len(prompts):
        raise SettingError(
            f"a temperature above 0 draws tokens and needs one seed a prompt: {len(seeds)} seeds for "
            f"{len(prompts)} prompts"
        )
    if not all(map(len, prompts)):
        raise DataError("a prompt has no tokens; a continuation needs one to follow")
    if tokens < 1:
        return [torch.zeros(0, dtype=torch.long) for _ in prompts]
    room = [tokens if context is None else max(1, min(tokens, context - len(p))) for p in prompts]
    waiting = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    draws = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature > 0 else []
    said: list[list[int]] = [[] for _ in prompts]
    stops, training = frozenset(ends), model.training
    model.eval()
    try:
        rows = _Rows(model, filler)
        while waiting or rows.live:
            ended = len(rows.places) - len(rows.live)
            free = batch_size - len(rows.live)
            if (not rows.live or (rows.movable and 4 * ended >= len(rows.places))) and ended:
                rows.drop_ended()
            if waiting and (not rows.places or (rows.movable and 4 * free >= batch_size)):
                some, waiting = waiting[:free], waiting[free:]
                logits = rows.admit(some, [prompts[n] for n in some])
            else:
                logits, some = rows.step(), rows.places
            chosen = _pick(logits, temperature, [draws[n] for n in some] if draws else [])
            rows.take(some, chosen)
            for n, token in zip(some, chosen.tolist(), strict=True):
                if n not in rows.live:
                    continue
                if token not in stops:
                    said[n].append(token)
                if token in stops or len(said[n]) == room[n]:
                    rows.live.remove(n)
    finally:
        model.train(training)
    return [torch.tensor(row, dtype=torch.long) for row in said]


def _pick(logits: Tensor, temperature: float, draws: Sequence[torch.Generator]) -> Tensor:
    """The next token [B] from logits [B, V]."""
    if not draws:
        return logits.argmax(-1)
    reached = (logits.double() / temperature).softmax(-1).cumsum(-1)
    levels = torch.stack([torch.rand((), generator=g, dtype=torch.double) for g in draws])
    found = torch.searchsorted(reached, levels.to(logits.device)[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


class _Rows:
    """Sequences that grow side by side.

    Attributes:
        places: which prompt each row of the cache belongs to.
        live: those that have not ended.
        movable: whether rows of the cache can be dropped and added.
    """

    def __init__(self, model: nn.Module, filler: int) -> None:
        self.model, self.filler = model, filler
        self.device = next(model.parameters()).device
        self.places: list[int] = []
        self.live: set[int] = set()
        self.movable = False
        self._cache: Any = None
        self._last = self._at = self._mask = torch.zeros(0, 0, dtype=torch.long)

    def admit(self, places: list[int], prompts: list[Tensor]) -> Tensor:
        """Read prompts and give them rows; logits [B, V] of their first tokens."""
        from expunge.problems.roomy_cache import roomy  # with transformers, which is an extra

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.filler)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        mask = mask.to(self.device)
        at = (mask.cumsum(1) - 1).clamp(min=0)
        output = self._ask(ids.to(self.device), mask, at, None)
        if self.places:
            _join(self._cache, output.past_key_values)
            wide = max(self._mask.shape[1], width)
            self._mask = torch.cat([_wider(m, wide) for m in (self._mask, mask)])
            self._at = torch.cat([self._at, at[:, -1:]])
        else:
            self._cache, self._mask, self._at = output.past_key_values, mask, at[:, -1:]
            self._last = self._at.new_zeros(0, 1)
        self.movable = roomy(self.model, self._cache)
        self.places = [*self.places, *places]
        self.live |= set(places)
        return output.logits[:, -1]

    def step(self) -> Tensor:
        """Logits [B, V] of the next token of every row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        self._at = self._at + 1
        with TurnedProducts():
            output = self._ask(self._last, self._mask, self._at, self._cache)
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def take(self, places: list[int], chosen: Tensor) -> None:
        """Note the tokens [B] that were chosen for all rows, or for those just admitted."""
        kept = self._last[: len(self.places) - len(places)]
        self._last = torch.cat([kept, chosen[:, None]])

    def drop_ended(self) -> None:
        """Free the rows of sequences that have ended."""
        if not self.live:
            self.places = []
            return
        stay = [row for row, n in enumerate(self.places) if n in self.live]
        rows = torch.tensor(stay, device=self.device)
        self.places = [self.places[row] for row in stay]
        self._last, self._at, self._mask = self._last[rows], self._at[rows], self._mask[rows]
        empty = int(self._mask.argmax(1).min())  # columns that are padding in every row
        self._mask = self._mask[:, empty:]
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[rows][:, :, empty:]
                layer.values = layer.values[rows][:, :, empty:]

    def _ask(self, ids: Tensor, mask: Tensor, at: Tensor, cache: Any) -> Any:
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip


def _join(cache: Any, more: Any) -> None:
    """Add the rows of another cache, both padded on the left to the longer of them."""
    for layer, new in zip(cache.layers, more.layers, strict=True):
        if layer.is_initialized:
            width = max(layer.keys.shape[2], new.keys.shape[2])
            layer.keys = torch.cat([_longer(k, width) for k in (layer.keys, new.keys)])
            layer.values = torch.cat([_longer(v, width) for v in (layer.values, new.values)])


def _wider(mask: Tensor, width: int) -> Tensor:
    return nn.functional.pad(mask, (width - mask.shape[1], 0))


def _longer(states: Tensor, width: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
