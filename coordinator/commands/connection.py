"""Which coordinator a command talks to, and how it gets there.

A coordinator elsewhere is reached over mutual TLS, the one that serves this folder over its socket.
Where nobody serves the folder, the command starts the same service for itself, over the same store,
on a socket that nobody else can open: there is one way in.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.admin_client import AdminClient

DEFAULT_HOME = Path("~/.fedloom/coordinator")
Home = Annotated[Path, typer.Option("--home", help="Folder of this coordinator.")]
Coordinator = Annotated[
    str, typer.Option("--coordinator", help="host:port of a coordinator elsewhere.")
]
Operator = Annotated[
    Path | None, typer.Option("--operator", help="Folder made by `operator add`, with it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")]


@dataclass(frozen=True)
class Where:
    """The options that every command has."""

    home: Path = DEFAULT_HOME
    coordinator: str = ""
    operator: Path | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether paths here mean nothing there."""
        return bool(self.coordinator)


@contextmanager
def reached(where: Where) -> Iterator["AdminClient"]:
    """Connect to the coordinator that is meant."""
    from coordinator.admin_client import AdminClient
    from coordinator.admin_socket import find_socket

    if bool(where.coordinator) != (where.operator is not None):
        raise ConfigError("--coordinator", "expected together with --operator FOLDER, or neither")
    if where.operator is not None:
        yield from _closing(AdminClient.remote(where.coordinator, where.operator.expanduser()))
        return
    home = where.home.expanduser()
    if (socket := find_socket(home)) is not None:
        yield from _closing(AdminClient.local(socket))
        return
    from coordinator.local_service import local_service

    with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
        socket = Path(folder) / "admin.sock"
        with local_service(home, socket):
            yield from _closing(AdminClient.local(socket, is_private=True))


def is_served(where: Where) -> bool:
    """Whether a coordinator serves the folder by now."""
    from coordinator.admin_socket import find_socket

    return find_socket(where.home.expanduser()) is not None


def _closing(client: "AdminClient") -> "Iterator[AdminClient]":
    try:
        yield client
    finally:
        client.close()
