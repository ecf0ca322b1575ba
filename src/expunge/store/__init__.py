"""Append-only evidence: one SQLite file and content-addressed blobs."""
