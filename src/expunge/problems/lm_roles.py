"""Which modules of a causal language model play which role, found from its structure and names."""

from __future__ import annotations

from typing import Any

from torch import nn

_SUFFIXES = {
    "attention in": ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"),
    "attention out": ("o_proj", "out_proj", "self_attn.dense", "attn.c_proj", "attention.dense"),
    "mlp in": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h"),
    "mlp out": ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"),
}
"""Ends of module names by role: Llama, Qwen, Gemma, Mistral, Phi, GPT-2, GPT-NeoX and OPT families."""


def lm_roles(model: nn.Module) -> dict[str, list[str]]:
    """Find the roles of a causal language model.

    Args:
        model: a transformers model.

    Returns:
        Module names in order of depth for those found of `blocks`, `attention in`, `attention
        out`, `mlp in`, `mlp out`, `linear` (all four together), `embeddings` and `last layer`.
    """
    blocks = _blocks(model)
    inside = [n for n, _ in model.named_modules() if any(n.startswith(b + ".") for b in blocks)]
    roles = {"blocks": blocks}
    for role, ends in _SUFFIXES.items():
        roles[role] = [n for n in inside if any(n.endswith("." + end) for end in ends)]
    linear = {n for role in _SUFFIXES for n in roles[role]}
    roles["linear"] = [n for n in inside if n in linear]
    named = {id(m): n for n, m in model.named_modules()}
    for role, get in (
        ("embeddings", "get_input_embeddings"),
        ("last layer", "get_output_embeddings"),
    ):
        module = _asked(model, get)
        if module is not None and id(module) in named:
            roles[role] = [named[id(module)]]
    return {role: names for role, names in roles.items() if names}


def _asked(model: nn.Module, get: str) -> Any:
    """What a getter of transformers gives; None where the model has none or does not fill it in."""
    try:
        return getattr(model, get, lambda: None)()
    except NotImplementedError:
        return None


def _blocks(model: nn.Module) -> list[str]:
    """Members of the outermost list of modules of one class that is longest."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        return []
    name, module = max(lists, key=lambda found: (len(found[1]), -found[0].count(".")))
    return [f"{name}.{index}" for index in range(len(module))]
