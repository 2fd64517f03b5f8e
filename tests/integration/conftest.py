"""Fixtures: a federation on loopback for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.federation import Federation

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture
async def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Federation]:
    """Return a coordinator that serves; it and every agent end with the test."""
    monkeypatch.setattr("coordinator.server.SHUTDOWN_SECONDS", 0.1)
    monkeypatch.setattr("coordinator.conductor.TICK_SECONDS", 0.05)
    monkeypatch.setattr("edge_agent.session.LAST_BACKOFF_SECONDS", 0.4)
    found = Federation(tmp_path)
    await found.start()
    yield found
    await found.close()
