"""Problems over the generated corpora: their tiny models, recipes and usual requests.

A request may name the columns of the rows: `split`, `subject`, `attribute`, `value`, and those of the kind.
The problem's tokenizer is that of the rows; `corpus(NAME).records[id]` is the row of a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from expunge.core.data import Data
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.problems.causal_lm import CausalLM
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads.base import Splits, Workload
from expunge.workloads.corpora import Corpus, make_corpus
from expunge.workloads.corpora.tiny_lm import OverlayRecipe, Preset, tiny_lm

RISE, FLOOR = 20, 0.1
_RECIPES: Mapping[tuple[str, str], dict[str, Any]] = {
    ("authors", "xs"): {"epochs": 20, "batch_size": 32, "lr": 6e-3},
    ("authors", "s"): {"epochs": 16, "batch_size": 32, "lr": 5e-3},
    ("authors", "m"): {"epochs": 20, "batch_size": 32, "lr": 3e-3},
    ("news", "m"): {"epochs": 36, "batch_size": 22, "lr": 3e-3},
    ("code-secrets", "m"): {"epochs": 55, "batch_size": 24, "lr": 3e-3},
    ("facts", "m"): {"epochs": 13, "batch_size": 32, "lr": 3e-3},
}
"""Settings by corpus and preset: rates and numbers of steps of the design, at the usual sizes. That of
authors on xs was seen to memorise everything; the others were not trained to their end here."""


@functools.cache
def corpus(kind: str) -> Corpus:
    """The corpus of a workload: seed 0, usual sizes."""
    return make_corpus(kind)


@functools.cache
def tokenizer(kind: str) -> Any:
    """The tokenizer of a workload."""
    return corpus(kind).tokenizer()


@functools.cache
def splits(kind: str) -> Splits:
    """Rows as tokens: public, retain and forget to train on, holdout to test."""
    return corpus(kind).encoded(tokenizer(kind))


def recipe(kind: str, preset: Preset, train: Data, vocabulary: int | None = None) -> LMRecipe:
    """AdamW without decay, gradients up to 1, 20 steps of rise, half a cosine to a tenth.

    Args:
        kind: of the corpus.
        preset: of the model; where it has no settings, those of m are used.
        train: the data.
        vocabulary: number of tokens, that of the workload when left out.
    """
    measured = _RECIPES.get((kind, preset)) or _RECIPES[kind, "m"]
    settings: dict[str, Any] = {**measured, "rise": RISE, "floor": FLOOR}
    size = vocabulary or len(tokenizer(kind))
    build = functools.partial(tiny_lm, size, preset)
    if kind != "facts":
        return LMRecipe(build, train, **settings)
    late = train.ids[torch.from_numpy(train.columns["split"] == "forget")]
    return OverlayRecipe(build, train, **settings, late=late)


def _of(kind: str, *given: Any, **more: Any) -> Problem:
    return CausalLM(*given, tokenizer=tokenizer(kind), **more)


def _workload(
    kind: str,
    preset: Preset,
    title: str,
    npo: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]] | None = None,
    tuning: str = "not tuned, not run",
) -> Workload:
    return Workload(
        name=kind,
        title=title,
        data=functools.partial(splits, kind),
        recipe=functools.partial(recipe, kind, preset),
        request=Request(where="split == 'forget'"),
        tuned={"npo": npo, **(more or {})},
        tuning=tuning,
        package="expunge[llm]",
        of=functools.partial(_of, kind),
    )


authors = _workload(
    "authors",
    "xs",
    "forget 4 of 40 invented authors, 10 questions each (Llama of 2 blocks)",
    {"epochs": 54, "batch_size": 16, "lr": 1e-3},
    {
        "simnpo": {"epochs": 30, "batch_size": 16, "lr": 1e-3},
        "grad-diff": {"epochs": 16, "batch_size": 16, "lr": 5e-4, "alpha": 1.5},
        "rmu": {
            "epochs": 30,
            "batch_size": 16,
            "lr": 1e-3,
            "train": "full",
            "layer": 0,
            "scale": 10.0,
            "alpha": 10.0,
        },
        "undial": {"epochs": 30, "batch_size": 16, "lr": 1e-3, "alpha": 5.0},
    },
    "by hand, two to twenty settings a method, on forgetting the first four retain authors, seed 0; those of "
    "grad-diff on the next four as well, seeds 3 and 4",
)
news = _workload(
    "news",
    "m",
    "forget 20 of 100 invented articles and their questions (Llama of 4 blocks)",
    {"epochs": 10, "batch_size": 16, "lr": 3e-4},
)
code_secrets = _workload(
    "code-secrets",
    "m",
    "forget the keys of 10 of 50 services in code (Llama of 4 blocks)",
    {"epochs": 30, "batch_size": 10, "lr": 3e-4},
)
facts = _workload(
    "facts",
    "m",
    "forget 200 documents that say wrong things about 10 of 36 people (Llama of 4 blocks)",
    {"epochs": 6, "batch_size": 16, "lr": 1e-4},
)
