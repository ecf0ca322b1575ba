"""What a model says greedily when it is asked for the whole text again at every token."""

from __future__ import annotations

import torch


@torch.no_grad()
def without_cache(model, prompt, tokens, ends=()):
    """New token ids of one prompt [T], up to the first that ends a text."""
    ids = prompt[None]
    for _ in range(tokens):
        new = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        if int(new) in ends:
            break
        ids = torch.cat([ids, new], 1)
    return ids[0, len(prompt) :].tolist()
