"""Revisions of the database: an older one is brought up, whole or not at all; a newer one never."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from coordinator import migrations
from coordinator.schema import METADATA
from coordinator.store import Store
from fedloom.errors import ConfigError

FIRST = "0001"
LATER = "9999"
REVISION_FILE = """
import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"


def upgrade() -> None:
    op.create_table("later", sa.Column("number", sa.Integer))
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("owner", sa.String, nullable=False, server_default="nobody"))
    op.execute("INSERT INTO later VALUES (1)")
    {last}
"""


@pytest.fixture
def engine(place: Path | str) -> Iterator[sa.Engine]:
    """A way past the store to the same database."""
    opened = sa.create_engine(f"sqlite:///{place}" if isinstance(place, Path) else place)
    yield opened
    opened.dispose()


def migrate(engine: sa.Engine, revision: str) -> None:
    """Bring the database to a revision by Alembic alone."""
    with engine.begin() as db:
        command.upgrade(migrations.configuration(db), revision)


def revision_of(engine: sa.Engine) -> str:
    with engine.connect() as db:
        return str(db.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one())


def described(engine: sa.Engine) -> dict[str, Any]:
    """Return every table with its columns and constraints."""
    found = sa.inspect(engine)
    return {
        table: (
            [(c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(table)],
            found.get_pk_constraint(table),
            found.get_unique_constraints(table),
            found.get_indexes(table),
        )
        for table in found.get_table_names()
    }


def revisions() -> list[str]:
    """Return all revisions, oldest first."""
    with sa.create_engine("sqlite://").connect() as db:
        scripts = ScriptDirectory.from_config(migrations.configuration(db))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def test_the_store_writes_the_last_revision() -> None:
    assert revisions()[0] == FIRST
    assert revisions()[-1] == migrations.REVISION


def test_the_revisions_lead_to_the_schema(engine: sa.Engine) -> None:
    migrate(engine, "head")
    with engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), METADATA) == []


def test_a_new_database_is_what_the_revisions_lead_to(place: Path | str, engine: sa.Engine) -> None:
    Store(place).close()
    made = described(engine)
    with engine.begin() as db:
        for table in made:
            db.execute(sa.text(f"DROP TABLE {table}"))
    migrate(engine, "head")
    assert described(engine) == made
    assert revision_of(engine) == migrations.REVISION


@pytest.mark.parametrize("revision", revisions())
def test_a_database_of_any_revision_is_brought_up_with_its_rows(
    place: Path | str, engine: sa.Engine, revision: str
) -> None:
    migrate(engine, revision)
    with engine.begin() as db:
        db.execute(
            sa.text(
                "INSERT INTO agents (agent_id, public_key_sha256, enrolled_at, certificate_until) "
                "VALUES ('a', :key, 1.5, 2.5)"
            ),
            {"key": bytes(32)},
        )
    store = Store(place)
    assert [(a.agent_id, a.enrolled_at) for a in store.roster.agents()] == [("a", 1.5)]
    store.close()
    assert revision_of(engine) == migrations.REVISION


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that the software has one revision more; return its file."""
    folder = tmp_path / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, folder)
    file = folder / "versions" / "later.py"
    text = REVISION_FILE.format(revision=LATER, before=migrations.REVISION, last="pass")
    file.write_text(text)
    monkeypatch.setattr(migrations, "SCRIPTS", str(folder))
    monkeypatch.setattr(migrations, "REVISION", LATER)
    return file


def add_run(engine: sa.Engine) -> None:
    columns = "number, run_id, name, config, plan_sha256, plan_size, phase, round, attempt, wish"
    values = "7, :run_id, 'old', '', :plan, 1, 'gathering', 1, 0, 'run', 0"
    with engine.begin() as db:
        statement = sa.text(f"INSERT INTO runs ({columns}, created_at) VALUES ({values})")  # noqa: S608
        db.execute(statement, {"run_id": bytes(16), "plan": bytes(32)})


def test_an_older_database_is_upgraded_once_by_whoever_is_first(
    place: Path | str, engine: sa.Engine, later: Path
) -> None:
    migrate(engine, FIRST)
    add_run(engine)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(Store, [place] * 4))
    for store in stores:
        assert [run.name for run in store.runs()] == ["old"]
        store.close()
    with engine.connect() as db:
        assert db.execute(sa.text("SELECT number FROM later")).all() == [(1,)]
        assert db.execute(sa.text("SELECT owner FROM runs")).all() == [("nobody",)]
    assert revision_of(engine) == LATER


def test_a_revision_that_fails_changes_nothing(
    place: Path | str, engine: sa.Engine, later: Path
) -> None:
    migrate(engine, FIRST)
    add_run(engine)
    before = described(engine)
    later.write_text(later.read_text().replace("pass", 'raise ZeroDivisionError("half way")'))
    with pytest.raises(ZeroDivisionError):
        Store(place)
    assert described(engine) == before
    assert revision_of(engine) == FIRST


def test_a_newer_database_is_refused_and_left_alone(place: Path | str, engine: sa.Engine) -> None:
    Store(place).close()
    with engine.begin() as db:
        db.execute(sa.text("UPDATE alembic_version SET version_num = '0815'"))
    before = described(engine)
    with pytest.raises(ConfigError, match="0815: a newer version of this software wrote it"):
        Store(place)
    assert described(engine) == before
    assert revision_of(engine) == "0815"


def test_tables_of_no_revision_are_refused(place: Path | str, engine: sa.Engine) -> None:
    METADATA.tables["runs"].create(engine)
    with pytest.raises(ConfigError, match="found the table runs and no revision"):
        Store(place)
    assert set(described(engine)) == {"runs"}


def test_tables_of_others_are_no_obstacle(place: Path | str, engine: sa.Engine) -> None:
    with engine.begin() as db:
        db.execute(sa.text("CREATE TABLE theirs (number INTEGER)"))
    Store(place).close()
    Store(place).close()


def test_many_may_make_a_new_database_at_once(place: Path | str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for store in pool.map(Store, [place] * 4):
            assert store.runs() == []
            store.close()


def test_opening_a_present_database_loads_no_alembic(store_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from coordinator.store import Store;"
        "[Store(Path(sys.argv[1])).close() for _ in range(2)];"
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, store_path], check=True)
