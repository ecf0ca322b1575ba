"""Tables of the service, every column with a comment that says what it holds.

They live in the database of the durable workflows, so that a request and the workflow that carries it are
written in one transaction. What names a person or a record is in `samples` and beside the ledger
(`ledger_selectors`) alone, and is deleted when its request ends.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

requests = sa.Table(
    "expunge_requests",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="sortable identifier, 26 characters"),
    sa.Column("model", sa.Text, nullable=False, comment="name of the model in the policy file"),
    sa.Column("state", sa.Text, nullable=False, comment="see states.py"),
    sa.Column(
        "attempt", sa.Integer, nullable=False, comment="how often it was carried out, from 1"
    ),
    sa.Column("key", sa.Text, unique=True, comment="idempotency key of whoever submitted it"),
    sa.Column("form", sa.Text, nullable=False, comment="what it names: ids, label, where, …"),
    sa.Column("reason", sa.Text, nullable=False, comment="why, in the words of who submitted it"),
    sa.Column("created", sa.Text, nullable=False, comment="when it came in, ISO 8601, UTC"),
    sa.Column("updated", sa.Text, nullable=False, comment="when its state last changed"),
    sa.Column("hold", sa.Boolean, nullable=False, comment="whether it waits for approval"),
    sa.Column("alone", sa.Boolean, nullable=False, comment="whether it shares no batch"),
    sa.Column("batch", sa.Text, comment="the batch that carries it out"),
    sa.Column("count", sa.Integer, comment="how many samples it covers"),
    sa.Column("plan", sa.JSON, comment="what carrying it out takes; no ids"),
    sa.Column("result", sa.JSON, comment="outcome, findings, version of the model"),
    sa.Column(
        "error", sa.Text, comment="why it was not carried out, or what it waits for, a sentence"
    ),
    sa.Column("certificate", sa.JSON, comment="signed envelope"),
    sa.Index("expunge_requests_by_state", "model", "state"),
    sa.Index("expunge_requests_by_batch", "batch"),
)

samples = sa.Table(
    "expunge_samples",
    metadata,
    sa.Column("request", sa.Text, primary_key=True, comment="whose samples"),
    sa.Column("ids", sa.JSON, nullable=False, comment="sample ids it resolved to"),
)

history = sa.Table(
    "expunge_history",
    metadata,
    sa.Column("request", sa.Text, primary_key=True, comment="whose history"),
    sa.Column("number", sa.Integer, primary_key=True, comment="from 1"),
    sa.Column("state", sa.Text, nullable=False, comment="state entered"),
    sa.Column("time", sa.Text, nullable=False, comment="when, ISO 8601, UTC"),
    sa.Column("note", sa.JSON, nullable=False, comment="what is worth telling about it"),
)

batches = sa.Table(
    "expunge_batches",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="identifier of its workflow"),
    sa.Column("model", sa.Text, nullable=False, index=True, comment="model it changes"),
    sa.Column("state", sa.Text, nullable=False, comment="waiting, running, done or failed"),
    sa.Column("created", sa.Text, nullable=False, comment="when it was asked for"),
)

models = sa.Table(
    "expunge_models",
    metadata,
    sa.Column("name", sa.Text, primary_key=True, comment="name in the policy file"),
    sa.Column("version", sa.Integer, nullable=False, comment="version in force; 0 the original"),
)

versions = sa.Table(
    "expunge_versions",
    metadata,
    sa.Column("model", sa.Text, primary_key=True, comment="whose version"),
    sa.Column("version", sa.Integer, primary_key=True, comment="1 after the first deletion"),
    sa.Column("batch", sa.Text, nullable=False, unique=True, comment="the batch that made it"),
    sa.Column("folder", sa.Text, nullable=False, comment="name of its folder among the versions"),
    sa.Column("weights", sa.Text, nullable=False, comment="SHA-256 of its weights"),
    sa.Column("created", sa.Text, nullable=False, comment="when it was released"),
    sa.Column("record", sa.JSON, nullable=False, comment="method, costs and findings; no ids"),
)

workers = sa.Table(
    "expunge_workers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, comment="name of the process for its workflows"),
    sa.Column("host", sa.Text, nullable=False, comment="machine it runs on"),
    sa.Column("started", sa.Text, nullable=False, comment="when it was started"),
    sa.Column("beat", sa.Float, nullable=False, comment="last sign of life, seconds since 1970"),
)
