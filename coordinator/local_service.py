"""The operator's service for one command, where no coordinator serves the folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from coordinator.admin_listener import answering
from coordinator.audit import AuditLog
from coordinator.premises import load_server_config, open_operations, open_published, open_store
from fedloom.logs import configure_logs


@contextmanager
def local_service(home: Path, socket: Path) -> Iterator[None]:
    """Answer on a private socket, over the folder's store."""
    quiet_logs()
    config = load_server_config(home)
    store = open_store(home)
    try:
        operations = open_operations(home, config, store, open_published(home))
        with answering(operations, AuditLog(store.engine), socket):
            yield
    finally:
        store.close()


def quiet_logs() -> None:
    """Log to stderr, and what goes wrong only: what a command prints may be read by a program."""
    if not structlog.is_configured():
        configure_logs(as_json=False, level="warning")
