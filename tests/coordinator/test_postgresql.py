"""PostgreSQL at run time: where its password lies, and what happens while it is away."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.database import open_database, postgresql_url, shown
from coordinator.faults import StorageFault
from coordinator.premises import open_store
from coordinator.store import Store
from fedloom.errors import ConfigError
from tests.coordinator.postgresql import GUARDED, PASSWORD, PostgresServer, postgres_server

SECRET = "hunter2"  # noqa: S105 - must be seen nowhere


@pytest.fixture
def url(postgresql: PostgresServer) -> Iterator[str]:
    with postgresql.database() as found:
        yield found


@pytest.fixture
def mortal() -> Iterator[PostgresServer]:
    """A server that a test may end."""
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql+psycopg://user:{SECRET}@host/database",
        f"postgresql://user:{SECRET}@host:not-a-port/database",
        f"postgresql+psycopg://host/database?user=me&password={SECRET}",
        f"postgresql+psycopg://host/database?sslpassword={SECRET}",
        f"mysql://user:{SECRET}@host/database",
        f"postgresql+psycopg2://user:{SECRET}@host/database",
        f"user:{SECRET}@host",
    ],
)
def test_a_url_with_a_password_or_of_another_kind_is_refused_unquoted(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        postgresql_url(text)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_is_shown_of_a_url_tells_the_place_alone() -> None:
    url = sa.make_url(f"postgresql+psycopg://me:{SECRET}@db:5433/fedloom?sslkey=/secret/path")
    assert shown(url) == "postgresql+psycopg://me:***@db:5433/fedloom"


def test_a_password_comes_from_a_file(
    url: str, postgresql: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = str(sa.make_url(url).database)
    place = postgresql.url(database, user=GUARDED)
    passwords = tmp_path / "pgpass"
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    passwords.write_text(f"*:*:{database}:{GUARDED}:{SECRET}\n")
    passwords.chmod(0o600)
    with pytest.raises(StorageFault, match="password authentication failed") as caught:
        open_database(place)
    assert SECRET not in str(caught.value)
    passwords.write_text(f"*:*:{database}:{GUARDED}:{PASSWORD}\n")
    Store(place).close()


def test_a_service_file_may_say_it_all(
    url: str, postgresql: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = sa.make_url(url).database
    services = tmp_path / "services"
    lines = [f"host={postgresql.folder}", f"user={GUARDED}", f"password={PASSWORD}"]
    services.write_text("\n".join(["[fedloom]", *lines, f"dbname={database}", ""]))
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    (tmp_path / "coordinator.toml").write_text('store = "postgresql+psycopg://?service=fedloom"\n')
    store = open_store(tmp_path)
    assert store.runs() == []
    store.close()


def test_a_connection_that_was_cut_is_opened_anew(url: str, postgresql: PostgresServer) -> None:
    store = Store(url)
    for _ in range(3):
        assert store.runs() == []
        cut = postgresql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'fedloom-coordinator'"
        )
        assert cut == [(True,)]
    assert store.runs() == []
    store.close()


def test_a_server_that_is_away_is_a_fault_and_its_return_is_enough(mortal: PostgresServer) -> None:
    with mortal.database() as url:
        store = Store(url)
        mortal.stop()
        for _ in range(2):
            with pytest.raises(StorageFault, match="connection") as caught:
                store.runs()
            assert caught.value.where == shown(sa.make_url(url))
        with pytest.raises(StorageFault):
            Store(url)
        mortal.start()
        assert store.runs() == []
        store.close()


def test_a_statement_that_is_cut_off_is_a_fault_and_changes_nothing(
    url: str, postgresql: PostgresServer
) -> None:
    engine = open_database(url)
    db = engine.connect()
    db.execute(
        sa.text(
            "INSERT INTO agents (agent_id, public_key_sha256, enrolled_at, certificate_until) "
            "VALUES ('a', '', 0, 0)"
        )
    )
    with pytest.raises(StorageFault, match="terminating connection"):
        db.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
    db.close()
    with engine.connect() as db:
        assert db.execute(sa.text("SELECT * FROM agents")).all() == []
    engine.dispose()


def test_an_error_of_ours_is_no_fault_of_the_server(url: str) -> None:
    engine = open_database(url)
    with pytest.raises(sa.exc.ProgrammingError), engine.connect() as db:
        db.execute(sa.text("SELECT * FROM nowhere"))
    engine.dispose()


def test_without_the_driver_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from coordinator.database import open_database\n"
        "open_database('postgresql+psycopg://host/database')\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert 'ConfigError: store: PostgreSQL needs more packages: pip install "fedloom[' in (
        failed.stderr
    )
