"""The tables of a store, every column with a comment that says what it holds.

Changing anything here takes a new migration beside this module; a test compares the two.
"""

from __future__ import annotations

import sqlalchemy as sa

REVISION = "0001"
"""The newest migration, the one this version of expunge writes."""

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="sortable identifier, 26 characters"),
    sa.Column("kind", sa.Text, nullable=False, comment="original, reference, unlearn or audit"),
    sa.Column("key", sa.Text, nullable=False, comment="content key of everything the run rests on"),
    sa.Column("created", sa.Text, nullable=False, comment="when it was stored, ISO 8601, UTC"),
    sa.Column("status", sa.Text, nullable=False, comment="done, or how else the run ended"),
    sa.Column("problem", sa.Text, comment="name of the problem, from the record"),
    sa.Column("method", sa.Text, comment="name of the method, from the record"),
    sa.Column("seed", sa.BigInteger, comment="seed of the run, from the record"),
    sa.Column("weights", sa.Text, comment="SHA-256 of the run's weights, from the record"),
    sa.Column("blob", sa.Text, comment="content hash of the run's tensors, if it has any"),
    sa.Column("record", sa.JSON, nullable=False, comment="settings, seeds, versions, hashes, cost"),
    sa.Index("runs_by_key", "kind", "key", "status"),
    sa.Index("runs_by_names", "problem", "method"),
)

parents = sa.Table(
    "parents",
    metadata,
    sa.Column(
        "run_id", sa.Text, sa.ForeignKey("runs.id"), primary_key=True, comment="the later run"
    ),
    sa.Column(
        "position", sa.Integer, primary_key=True, comment="place in the list of parents, from 0"
    ),
    sa.Column(
        "parent_id",
        sa.Text,
        sa.ForeignKey("runs.id"),
        nullable=False,
        index=True,
        comment="a run it was made from",
    ),
)

findings = sa.Table(
    "findings",
    metadata,
    sa.Column(
        "run_id", sa.Text, sa.ForeignKey("runs.id"), primary_key=True, comment="the audit's run"
    ),
    sa.Column(
        "position", sa.Integer, primary_key=True, comment="place in the audit's list, from 0"
    ),
    sa.Column("name", sa.Text, nullable=False, comment="audit/what, e.g. accuracy/forget-test"),
    sa.Column("value", sa.Float, comment="the number; empty if it could not be computed"),
    sa.Column(
        "direction", sa.Text, nullable=False, comment="where good lies: reference, up or down"
    ),
    sa.Column("low", sa.Float, comment="lower end of the 95 % interval over samples"),
    sa.Column("high", sa.Float, comment="upper end of the 95 % interval over samples"),
    sa.Column("reference", sa.Float, comment="mean of the same number over the references"),
    sa.Column("floor", sa.Float, comment="spread of the references among each other"),
    sa.Column("original", sa.Float, comment="the same number for the original model"),
    sa.Column("reason", sa.Text, comment="why there is no value or no reference"),
    sa.Column("arrays", sa.JSON, nullable=False, comment="per-sample array name to tensor name"),
    sa.Column("detail", sa.JSON, nullable=False, comment="what figures need, as JSON"),
)

suites = sa.Table(
    "suites",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="sortable identifier, 26 characters"),
    sa.Column("name", sa.Text, nullable=False, comment="name given by the suite's file"),
    sa.Column("created", sa.Text, nullable=False, comment="when it was started, ISO 8601, UTC"),
    sa.Column("spec", sa.JSON, nullable=False, comment="problems, requests, methods, seeds"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, comment="order of logging over all suites"),
    sa.Column(
        "suite_id",
        sa.Text,
        sa.ForeignKey("suites.id"),
        nullable=False,
        index=True,
        comment="the suite the job belongs to",
    ),
    sa.Column("key", sa.Text, nullable=False, comment="content key of the job"),
    sa.Column("status", sa.Text, nullable=False, comment="started, done, failed, skipped, …"),
    sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id"), comment="the run it made or found"),
    sa.Column("time", sa.Text, nullable=False, comment="when it was logged, ISO 8601, UTC"),
)
