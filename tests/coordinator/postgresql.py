"""A PostgreSQL server for tests: a temporary folder, a Unix socket, a user that may do nothing."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECONDS = 60.0
GUARDED, PASSWORD = "guarded", "correct-horse"


class PostgresServer:
    """A running server; its role `fedloom` needs no password, `guarded` does."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self.folder = folder
        self._data = folder / "data"
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        options = ["--username=fedloom", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        self._run("initdb", f"--pgdata={self._data}", "--no-sync", *options)
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"local all {GUARDED} scram-sha-256\n{rules.read_text()}")

    def start(self) -> None:
        """Serve on a socket in the folder, and on no network."""
        command = [*_unprivileged(), str(self._programs / "postgres")]
        settings = ["listen_addresses=", "fsync=off", "max_connections=50"]
        options = [part for setting in settings for part in ("-c", setting)]
        options += ["-D", str(self._data), "-k", str(self.folder)]
        log = (self.folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd="/")
        ready = ["pg_isready", "-q", "-h", str(self.folder)]
        for _ in range(int(PATIENCE_SECONDS / 0.05)):
            if self._run(*ready, check=False).returncode == 0:
                return
            _wait_a_little(self._process)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """End the server; its clients are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def url(self, database: str, user: str = "fedloom") -> str:
        """Return the URL of a database."""
        return f"postgresql+psycopg://{user}@/{database}?host={self.folder}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database and yield its URL."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        yield self.url(name)
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute as the administrator, beside the store."""
        import psycopg

        with psycopg.connect(
            f"host={self.folder} user=fedloom dbname=postgres", autocommit=True
        ) as db:
            cursor = db.execute(statement)  # type: ignore[arg-type] # the tests' own words
            return [] if cursor.description is None else cursor.fetchall()

    def _run(
        self, program: str, *options: str, check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        command = [*_unprivileged(), str(self._programs / program), *options]
        return subprocess.run(command, check=check, cwd="/", capture_output=True)


def _wait_a_little(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return
    raise AssertionError(f"expected a server that serves, found exit status {process.returncode}")


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server; skips where PostgreSQL is not installed."""
    programs = _programs()
    if programs is None or (os.geteuid() == 0 and shutil.which("setpriv") is None):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="fedloom-"))  # pytest's own folders are root's alone
    if (owner := _owner()) is not None:
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    server = PostgresServer(programs, folder)
    try:
        server.start()
        server.execute(f"CREATE ROLE {GUARDED} SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def _programs() -> Path | None:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def _owner() -> pwd.struct_passwd | None:
    """Return whose the server is: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _unprivileged() -> list[str]:
    """Return what makes a command its owner's.

    `Popen(user=...)` would fork this process, in which gRPC's threads may be at work.
    """
    owner = _owner()
    if owner is None:
        return []
    return ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
