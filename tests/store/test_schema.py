from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from expunge.store import Store, database, schema


def test_every_column_is_documented():
    columns = [c for table in schema.metadata.tables.values() for c in table.columns]
    assert len(columns) > 30
    assert [str(c) for c in columns if not (c.comment and len(c.comment) > 8)] == []


def test_the_migrations_build_exactly_the_schema_that_the_queries_use(tmp_path):
    store = Store.open(tmp_path / "s")
    store.start_suite("first write", {})
    with store._database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == schema.REVISION


def test_the_newest_migration_is_the_one_the_code_names():
    scripts = ScriptDirectory.from_config(database._scripts())
    assert scripts.get_heads() == [schema.REVISION]
