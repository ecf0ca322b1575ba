"""Run by Alembic: applies migrations on the connection that the store opened."""

from __future__ import annotations

from alembic import context

from expunge.store.schema import metadata

# The caller's transaction spans the migration, so a process that dies leaves the old schema.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
