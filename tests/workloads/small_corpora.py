"""Corpora of a few rows, with their tokenizers and tokens."""

from __future__ import annotations

import functools

from expunge.workloads.corpora import make_corpus

SMALL = {
    "authors": {"public": 1, "retain": 3, "forget": 2, "holdout": 1},
    "news": {"retain1": 3, "retain2": 2, "forget": 6, "holdout": 2},
    "code-secrets": {"public": 8, "retain": 4, "forget": 2, "holdout": 2},
    "facts": {"people": 6, "documents": 12, "attacked": 2, "attributes": 3, "corrupted": 9, "holdout": 1},
}  # fmt: skip


@functools.cache
def small(kind):
    made = make_corpus(kind, **SMALL[kind])
    tokenizer = made.tokenizer()
    return made, tokenizer, made.encoded(tokenizer)
