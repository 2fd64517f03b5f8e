"""The database behind the store: SQLite in WAL mode, one file, or PostgreSQL.

SQLite's `synchronous=NORMAL`: a killed process loses nothing; a power cut may lose the last
moments, never the file. What the database itself says is wrong becomes a `StorageFault`, whoever
asked; a statement that is wrong stays an error of ours.
"""

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from coordinator import migrations
from coordinator.faults import StorageFault, StorageFull
from fedloom.errors import ConfigError

LOCK_SECONDS = 30  # for a transaction of another process on the same file
# A server that is away must be noticed within seconds: the store is asked on the event loop.
_CONNECTION = {
    "application_name": "fedloom-coordinator",
    "connect_timeout": 5,  # seconds
    "tcp_user_timeout": 10_000,  # milliseconds
}
_DISK_FULL = "53100"  # PostgreSQL's SQLSTATE


def open_database(place: Path | str) -> sa.Engine:
    """Open a SQLite file, or a PostgreSQL URL, at the revision that this software writes.

    Raises ConfigError for a database that this software cannot use, StorageFault for one that does
    not answer.
    """
    if isinstance(place, Path):
        engine, where = _open_file(place), str(place)
    else:
        url = postgresql_url(place)
        engine, where = _open_server(url), shown(url)
    sa.event.listen(engine, "handle_error", lambda context: _raise_fault(where, context))
    try:
        migrations.bring_up(engine, where)
    except BaseException:
        engine.dispose()
        raise
    return engine


def insert(db: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """Begin an INSERT that may say what happens on conflict, in the database's own dialect."""
    return insert_for(db.dialect.name, table)


def insert_for(dialect: str, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """Do the same for the dialect of this name."""
    if dialect == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def postgresql_url(text: str) -> sa.URL:
    """Read a URL without a password; raises ConfigError, which never quotes the text."""
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        url = sa.make_url("unreadable://")
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ConfigError("store", 'expected "sqlite" or "postgresql+psycopg://USER@HOST/DATABASE"')
    if url.password is not None or any(key.endswith("password") for key in url.query):
        raise ConfigError(
            "store",
            "expected no password in the URL: put it into ~/.pgpass, a file that PGPASSFILE names, "
            "or a service file",
        )
    return url.set(drivername="postgresql+psycopg")


def shown(url: sa.URL) -> str:
    """Return the URL for logs and errors."""
    return url.set(query={}).render_as_string(hide_password=True)


def _open_file(path: Path) -> sa.Engine:
    url = sa.URL.create("sqlite", database=str(path))
    options = {"timeout": LOCK_SECONDS}
    engine = sa.create_engine(url, connect_args=options, hide_parameters=True)
    sa.event.listen(engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # Of several processes that open a new file one changes its mode; SQLite lets the others
            # fail at once instead of waiting for it.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _open_server(url: sa.URL) -> sa.Engine:
    options = {key: value for key, value in _CONNECTION.items() if key not in url.query}
    try:
        return sa.create_engine(url, connect_args=options, pool_pre_ping=True, hide_parameters=True)
    except ImportError as error:
        raise ConfigError(
            "store", 'PostgreSQL needs more packages: pip install "fedloom[postgresql]"'
        ) from error


def _raise_fault(where: str, context: sa.ExceptionContext) -> None:
    found = context.sqlalchemy_exception
    # DatabaseError itself, not its other children: a file that is no database, or a broken one.
    ours = isinstance(found, sa.exc.OperationalError) or type(found) is sa.exc.DatabaseError
    if context.is_pre_ping or not ours:
        return  # the pool connects anew after a failed ping
    error = context.original_exception
    if _says_full(error):
        raise StorageFull(where, "the database has no room: free some, then all goes on") from error
    raise StorageFault(where, " ".join(str(error).split())) from error


def _says_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.Error):
        return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL
    return getattr(error, "sqlstate", None) == _DISK_FULL
