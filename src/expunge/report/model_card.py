"""A model card for the hub, written from a run's record: what was done, and what may be said of it.

Nothing of the data is in it: no paths, no texts, no hashes of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.methods import registry

MEANINGS = {
    "suppression": "The model is made to answer as if it had not learned the data; its weights may still hold it.",
    "inference-time": "The model answers differently while its weights are as they were; they still hold the data.",
    "exact": "The weights were trained without the data.",
    "certified": "What is left of the data is bounded under the conditions that the method states.",
    "empirical": "The method is empirical: there is no proof that nothing of the data is left.",
}  # fmt: skip
"""What a card may say, by intent and guarantee of the method."""


def model_card(record: Mapping[str, Any], *, base: str, adapters: bool, repo: str) -> str:
    """Write a card in Markdown, with the hub's settings at its head.

    Args:
        record: of an unlearning run.
        base: name of the original on the hub, if it is known.
        adapters: whether the weights are adapters to put on the original.
        repo: name on the hub, for the lines that read it back.

    Returns:
        The text.
    """
    method, source = record["method"], record.get("source") or {}
    text = source.get("kind") == "causal-lm"
    head = ["---", "tags:", "- expunge", "- machine-unlearning"]
    head += ["library_name: peft"] if adapters else ["library_name: transformers"] if text else []
    head += ["pipeline_tag: text-generation"] if text else []
    head += [f"base_model: {base}"] if base else []
    lines = [*head, "---", "", f"# {repo.rpartition('/')[2]}", ""]
    named = f"`{base}`" if base else "a model"
    lines += [f"{named} after unlearning with expunge {record['packages'].get('expunge', '')}.", ""]
    lines += ["| | |", "|---|---|"]
    facts = {
        "method": f"`{method['name']}`",
        "samples to forget": record.get("forgotten"),
        "weights (SHA-256)": f"`{record.get('weights')}`",
        "seed": (record.get("runtime") or {}).get("seed"),
        "made": record.get("created"),
        "run": record.get("run"),
    }
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    lines += ["", "## What this means", "", *_meaning(str(method["name"]), adapters), ""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {k} | `{v}` |" for k, v in method["in_force"].items()]
    if text:
        lines += ["", "## Use", "", "```python", *_use(repo, base, adapters), "```"]
    return "\n".join(lines) + "\n"


def public_name(model: str) -> str:
    """A model's name if it is one on the hub; nothing of where it lies on somebody's disk."""
    return model if model.count("/") == 1 and not model.startswith((".", "/", "~")) else ""


def _meaning(name: str, adapters: bool) -> list[str]:
    lines = []
    if name in set(registry):
        card = registry.get(name).card
        suppresses = card.intent == "suppression"
        lines.append(MEANINGS[card.intent if suppresses else card.guarantee])
        lines.append(f"Method: {card.title} ({card.authors}, {card.year}), {card.link}")
    if adapters:
        lines.append(
            "These are adapters: the original below them still holds what was to be forgotten."
        )
    lines.append("No audit is part of this card.")
    return "\n\n".join(lines).split("\n")


def _use(repo: str, base: str, adapters: bool) -> list[str]:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if adapters:
        lines[:1] = ["from peft import PeftModel", lines[0]]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{base or "BASE"}")']
        lines += [f'model = PeftModel.from_pretrained(model, "{repo}")']
    else:
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{repo}")']
    return [*lines, f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
