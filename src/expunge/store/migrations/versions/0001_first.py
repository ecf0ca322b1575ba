"""First schema: runs, their parents and findings; suites and their job log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("created", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("problem", sa.Text),
        sa.Column("method", sa.Text),
        sa.Column("seed", sa.BigInteger),
        sa.Column("weights", sa.Text),
        sa.Column("blob", sa.Text),
        sa.Column("record", sa.JSON, nullable=False),
    )
    op.create_index("runs_by_key", "runs", ["kind", "key", "status"])
    op.create_index("runs_by_names", "runs", ["problem", "method"])
    op.create_table(
        "parents",
        sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("parent_id", sa.Text, sa.ForeignKey("runs.id"), nullable=False),
    )
    op.create_index("ix_parents_parent_id", "parents", ["parent_id"])
    op.create_table(
        "findings",
        sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", sa.Float),
        sa.Column("direction", sa.Text, nullable=False),
        sa.Column("low", sa.Float),
        sa.Column("high", sa.Float),
        sa.Column("reference", sa.Float),
        sa.Column("floor", sa.Float),
        sa.Column("original", sa.Float),
        sa.Column("reason", sa.Text),
        sa.Column("arrays", sa.JSON, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_table(
        "suites",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created", sa.Text, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("suite_id", sa.Text, sa.ForeignKey("suites.id"), nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id")),
        sa.Column("time", sa.Text, nullable=False),
    )
    op.create_index("ix_jobs_suite_id", "jobs", ["suite_id"])
