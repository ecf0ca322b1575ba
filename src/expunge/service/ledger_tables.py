"""Tables of the ledger, what refuses changes to its rows, and how they are made."""

from __future__ import annotations

import random
import time

import sqlalchemy as sa

ZERO = "0" * 64
"""What the first row names as the hash before it."""
metadata = sa.MetaData()
rows = sa.Table(
    "ledger",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False, comment="1, 2, 3, …"),
    sa.Column("time", sa.Text, nullable=False, comment="when it was written, ISO 8601, UTC"),
    sa.Column("kind", sa.Text, nullable=False, comment="what happened: received, released, …"),
    sa.Column(
        "request", sa.Text, nullable=False, index=True, comment="id of the request, or empty"
    ),
    sa.Column("body", sa.Text, nullable=False, comment="details, canonical JSON, nothing personal"),
    sa.Column("previous", sa.Text, nullable=False, unique=True, comment="hash of the row before"),
    sa.Column("hash", sa.Text, nullable=False, unique=True, comment="hash of this row"),
)
heads = sa.Table(
    "ledger_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False, comment="always 1"),
    sa.Column("seq", sa.BigInteger, nullable=False, comment="number of the last row"),
    sa.Column("hash", sa.Text, nullable=False, comment="hash of the last row"),
)
selectors = sa.Table(
    "ledger_selectors",
    metadata,
    sa.Column("request", sa.Text, primary_key=True, comment="id of the request"),
    sa.Column("selectors", sa.Text, comment="whom it names, canonical JSON; empty once purged"),
    sa.Column("salt", sa.Text, comment="of the commitments, hex; empty once destroyed"),
)
_REFUSAL = "the ledger is append-only"
for _verb in ("UPDATE", "DELETE"):
    sa.event.listen(
        rows,
        "after_create",
        sa.DDL(
            f"CREATE TRIGGER ledger_no_{_verb.lower()} BEFORE {_verb} ON ledger "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        ).execute_if(dialect="sqlite"),
    )
for _text in (
    "CREATE OR REPLACE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    "CREATE TRIGGER ledger_guard BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
    "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()",
):
    sa.event.listen(rows, "after_create", sa.DDL(_text).execute_if(dialect="postgresql"))


def create(engine: sa.Engine) -> None:
    """Make the tables and what refuses changes, unless they are there; several may call at once."""
    for attempt in range(50):
        try:
            with engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(4157203)"))
                elif connection.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                metadata.create_all(connection)
                if connection.scalar(sa.select(heads.c.id)) is None:
                    connection.execute(sa.insert(heads).values(id=1, seq=0, hash=ZERO))
            return
        except sa.exc.OperationalError:
            if attempt == 49:
                raise
            time.sleep(0.02 * (1 + random.random()))
