"""TinyFacts: invented facts about invented entities as token ids, for a Llama of 100,000 weights.

48 entities, named by two tokens, have 5 attributes each. A question is `[BOS, first, last, attribute,
Q]`, its answer three tokens, each from a pool of its own, and `EOS`. Entities 0 to 39 are trained, the rest is
held out; entities 0 to 3 are what is usually forgotten.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from expunge.core.data import Data
from expunge.core.request import Request
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads.base import Splits, Workload
from expunge.workloads.nets import small_llama

PAD, BOS, EOS, QUESTION = range(4)
NAMES, ATTRIBUTES, POOL, LENGTH = 7, 5, 24, 3
_FIRST = 4
_LAST = _FIRST + NAMES
_ATTRIBUTE = _LAST + NAMES
_VALUE = _ATTRIBUTE + ATTRIBUTES
VOCABULARY = 112


@functools.cache
def splits(entities: int = 48, trained: int = 40) -> Splits:
    """Questions about the entities that are trained and about the others.

    Columns are `entity` and `attribute`; every question has 5 perturbed answers as alternates.
    """
    rng = torch.Generator().manual_seed(0)
    names = torch.randperm(NAMES * NAMES, generator=rng)[:entities].tolist()
    questions = [(e, a) for e in range(entities) for a in range(ATTRIBUTES)]
    rows, alternates = [], []
    for entity, attribute in questions:
        name = names[entity]
        prompt = [
            BOS,
            _FIRST + name // NAMES,
            _LAST + name % NAMES,
            _ATTRIBUTE + attribute,
            QUESTION,
        ]
        value = torch.randint(POOL, (LENGTH,), generator=rng)
        shifts = torch.randint(1, POOL, (5, LENGTH), generator=rng)
        rows.append(_row(prompt, value))
        alternates.append([_row(prompt, (value + shift) % POOL) for shift in shifts])
    cut = trained * ATTRIBUTES
    train, held = (
        TokenData(
            rows[part],
            filler=PAD,
            ids=list(range(len(rows)))[part],
            columns={
                "entity": [e for e, _ in questions[part]],
                "attribute": [a for _, a in questions[part]],
            },
            alternates=alternates[part],
        )
        for part in (slice(0, cut), slice(cut, None))
    )
    return Splits(train, held)


def tiny_llama(hidden: int = 64, blocks: int = 3) -> nn.Module:
    """Build the untrained network."""
    return small_llama(VOCABULARY, hidden, blocks, 2 * hidden, context=64)


def recipe(train: Data) -> LMRecipe:
    """AdamW for some 900 steps of 64 samples, about 20 s on one core."""
    return LMRecipe(tiny_llama, train, epochs=225, lr=3e-3, batch_size=64, warmup=10, clip=None)


def quick_recipe(train: Data) -> LMRecipe:
    """The same in a few seconds."""
    build = functools.partial(tiny_llama, 32, 2)
    return LMRecipe(build, train, epochs=60, lr=1e-2, batch_size=16, warmup=5, clip=None)


def _row(prompt: list[int], value: Tensor) -> Tokens:
    answer = [_VALUE + place * POOL + int(v) for place, v in enumerate(value)] + [EOS]
    answered = torch.arange(len(prompt) + len(answer)) >= len(prompt)
    return Tokens(torch.tensor(prompt + answer), answered)


tinyfacts = Workload(
    name="tinyfacts",
    title="forget 4 of 40 invented entities, 5 facts each (Llama of 3 blocks)",
    data=splits,
    recipe=recipe,
    request=Request(where="entity < 4"),
    tuned={
        "npo": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "dpo": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "idk-dpo": {"epochs": 60, "lr": 5e-4, "batch_size": 20, "refusals": ("96 97 98",)},
        "altpo": {"epochs": 60, "lr": 5e-4, "batch_size": 20, "ask": "question", "tokens": 8},
        "pdu": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "rmu": {
            "epochs": 60,
            "lr": 1e-3,
            "batch_size": 20,
            "layer": 2,
            "scale": 6.0,
            "alpha": 10.0,
            "train": "full",
        },
        "grad-diff": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "kl-min": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "simnpo": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "wga": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "satimp": {"epochs": 60, "lr": 5e-4, "batch_size": 20},
        "ceu": {"epochs": 60, "lr": 5e-4, "batch_size": 20, "alpha": 1.0},
        "undial": {"epochs": 60, "lr": 5e-4, "batch_size": 20, "alpha": 1.0},
        "task-vector": {"epochs": 10, "lr": 1e-4, "strength": 5.0, "batch_size": 20},
        "whp": {"epochs": 10, "lr": 1e-4, "strength": 20.0, "batch_size": 20},
        "llmu": {"epochs": 60, "lr": 5e-4, "batch_size": 20, "gamma": 0.1},
        "code-eraser": {"epochs": 60, "lr": 5e-4, "batch_size": 40, "spans": "all", "rehearse": 2},
        "eco": {"sigma": 3.0},
        "o3": {"epochs": 60, "lr": 3e-3, "batch_size": 20, "warmup": 0, "refusals": ("96 97 98",)},
        "guard": {"refusal": "96 97 98"},
        "concept-mask": {
            "epochs": 60,
            "lr": 5e-4,
            "batch_size": 20,
            "train": "full",
            "mask": "96",
            "tokens": 4,
            "steps": 8,
        },
    },
    tuning="not tuned: settings of the paper's small run",
    package="expunge[llm]",
    of=CausalLM,
)
tinyfacts_quick = Workload(
    name="tinyfacts-quick",
    title="forget 2 of 12 invented entities, 5 facts each (Llama of 2 blocks)",
    data=functools.partial(splits, 15, 12),
    recipe=quick_recipe,
    request=Request(where="entity < 2"),
    tuned={
        "npo": {"epochs": 8, "lr": 2e-3, "batch_size": 5, "alpha": 5.0},
        "dpo": {"epochs": 8, "lr": 2e-3, "batch_size": 5},
        "idk-dpo": {"epochs": 8, "lr": 2e-3, "batch_size": 5, "refusals": ("96 97 98",)},
        "altpo": {"epochs": 8, "lr": 2e-3, "batch_size": 5, "ask": "question", "tokens": 8},
        "pdu": {"epochs": 8, "lr": 2e-3, "batch_size": 5, "dual_warmup": 2},
        "rmu": {
            "epochs": 8,
            "lr": 4e-3,
            "batch_size": 5,
            "layer": 1,
            "scale": 6.0,
            "alpha": 10.0,
            "train": "full",
        },
        "grad-diff": {"epochs": 8, "lr": 2e-3, "batch_size": 5},
        "kl-min": {"epochs": 15, "lr": 1e-3, "batch_size": 5, "alpha": 5.0},
        "simnpo": {"epochs": 20, "lr": 4e-3, "batch_size": 5},
        "wga": {"epochs": 8, "lr": 2e-3, "batch_size": 5},
        "satimp": {"epochs": 12, "lr": 2e-3, "batch_size": 5},
        "ceu": {"epochs": 8, "lr": 2e-3, "batch_size": 5, "alpha": 1.0},
        "undial": {"epochs": 12, "lr": 2e-3, "batch_size": 5, "alpha": 1.0},
        "task-vector": {"epochs": 5, "lr": 3e-3, "strength": 2.0},
        "whp": {"epochs": 5, "lr": 3e-3, "strength": 5.0},
        "llmu": {"epochs": 8, "lr": 2e-3, "batch_size": 5},
        "code-eraser": {"epochs": 20, "lr": 2e-3, "batch_size": 20, "spans": "all", "rehearse": 5},
        "eco": {"sigma": 3.0},
        "o3": {"epochs": 20, "lr": 3e-3, "batch_size": 10, "warmup": 0, "refusals": ("96 97 98",)},
        "guard": {"refusal": "96 97 98"},
        "concept-mask": {
            "epochs": 8,
            "lr": 2e-3,
            "batch_size": 5,
            "train": "full",
            "mask": "96",
            "tokens": 4,
            "steps": 8,
        },
    },
    tuning="not tuned: for tests",
    package="expunge[llm]",
    of=CausalLM,
)
