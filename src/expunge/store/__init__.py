"""Append-only evidence: one SQLite file and content-addressed blobs."""

from expunge.store.rows import Run
from expunge.store.store import Store

__all__ = ["Run", "Store"]
