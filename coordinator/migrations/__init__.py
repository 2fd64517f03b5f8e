"""Brings a database to the revision that this software writes.

`coordinator.schema` is what a database shall be; `versions` holds the way there from every older
revision, oldest first. A change of the schema needs a new file there, and `REVISION`. A new
database is made from the schema at once: tests prove that the way leads to the same.
Alembic is imported for an upgrade only: every command opens the store.
"""

from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from coordinator import schema
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from alembic.config import Config

REVISION = "0002"
SCRIPTS = "coordinator:migrations"
_LOCK = 0x6665646C6F6F6D  # PostgreSQL's advisory lock of whoever changes the schema: any number
_VERSION = sa.Table(  # as Alembic makes it
    "alembic_version",
    sa.MetaData(),
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
_log = structlog.get_logger()


def bring_up(engine: sa.Engine, where: str) -> None:
    """Make or upgrade the tables, in one transaction; raises ConfigError for what is not ours."""
    with engine.connect() as db:
        if _revision(db) == REVISION:
            return
    with engine.connect() as db:
        _lock(db)
        found = _revision(db)  # another process may have been first
        if found is None:
            _make(db, where)
        elif found != REVISION:
            _upgrade(db, where, found)
            _log.info("store upgraded", store=where, before=found, now=REVISION)
        db.commit()


def _revision(db: sa.Connection) -> str | None:
    if not sa.inspect(db).has_table(_VERSION.name):
        return None
    return db.execute(sa.select(_VERSION.c.version_num)).scalar_one_or_none()


def _lock(db: sa.Connection) -> None:
    """Begin the transaction alone: sqlite3 would begin none before it changes a schema."""
    if db.dialect.name == "sqlite":
        db.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        db.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


def _make(db: sa.Connection, where: str) -> None:
    foreign = set(sa.inspect(db).get_table_names()) & set(schema.METADATA.tables)
    if foreign:
        raise ConfigError(
            where,
            f"expected an empty database or one of this software, found the table {min(foreign)} "
            "and no revision: its version was never released; start with a new one",
        )
    schema.METADATA.create_all(db)
    _VERSION.create(db)
    db.execute(sa.insert(_VERSION).values(version_num=REVISION))


def _upgrade(db: sa.Connection, where: str, found: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    settings = configuration(db)
    try:
        ScriptDirectory.from_config(settings).get_revision(found)
    except CommandError as error:
        raise ConfigError(
            where,
            f"expected a database of revision {REVISION} or older, found {found}: a newer version "
            "of this software wrote it; install that version",
        ) from error
    command.upgrade(settings, REVISION)


def configuration(db: sa.Connection) -> "Config":
    """Return what Alembic needs to work on this connection, inside its transaction."""
    from alembic.config import Config

    settings = Config(attributes={"connection": db})
    settings.set_main_option("script_location", SCRIPTS)
    return settings
