"""Generated corpora: something real to forget without a download.

    from expunge.workloads.corpora import make_corpus
    corpus = make_corpus("authors", seed=0, forget=4)
    corpus.splits["forget"][0], corpus.md5(), corpus.tokenizer()

Same kind, version, seed and sizes: the same rows and vocabulary in every process.
"""

from __future__ import annotations

import importlib

from expunge.core.errors import SettingError
from expunge.workloads.corpora.shared import VERSION, Corpus

__all__ = ["KINDS", "Corpus", "make_corpus"]

KINDS = {
    "authors": "expunge.workloads.corpora.authors",
    "news": "expunge.workloads.corpora.news",
    "code-secrets": "expunge.workloads.corpora.code_secrets",
    "facts": "expunge.workloads.corpora.facts",
}


def make_corpus(kind: str, seed: int = 0, version: int = VERSION, **sizes: int) -> Corpus:
    """Generate a corpus.

    Args:
        kind: authors, news, code-secrets or facts.
        seed: of the generator.
        version: of the generator; only the present one can be made.
        **sizes: what of the kind's `SIZES` should differ.

    Returns:
        The corpus.

    Raises:
        SettingError: the kind, a size or the version is not known.
    """
    if kind not in KINDS:
        raise SettingError(f"there is no corpus {kind!r}; there are {', '.join(KINDS)}")
    if version != VERSION:
        raise SettingError(
            f"this expunge generates version {VERSION} of its corpora, not {version}"
        )
    found: Corpus = importlib.import_module(KINDS[kind]).make(seed, **sizes)
    return found
