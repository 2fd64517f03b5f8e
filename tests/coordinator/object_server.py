"""A server that speaks S3, as a process of its own on loopback, with buckets in its memory."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.bucket import open_bucket

PATIENCE_SECONDS = 60.0


class ObjectServer:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._numbers = itertools.count(1)

    def bucket(self) -> str:
        """Make an empty bucket and return its name."""
        name = f"bucket-{next(self._numbers)}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """Return a client of the tests' own, beside what they test."""
        return open_bucket("s3://any-bucket", self.endpoint, Path())._client


@contextmanager
def object_server(folder: Path) -> Iterator[ObjectServer]:
    """Start a server, and give this process the credentials that it does not look at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(folder))
    try:
        _await_port(process, port)
        with _credentials():
            yield ObjectServer(port)
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


@contextmanager
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "tests")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            environment.setenv(name, os.devnull)
        yield


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONWARNINGS": "ignore", "TMPDIR": str(folder)}


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"expected an object server, found exit status {process.poll()}")
