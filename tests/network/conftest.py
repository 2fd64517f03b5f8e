"""Fixtures: a federation on loopback whose agents can be put behind a bad network."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.services.limits import Admission
from fedloom.channels import CLIENT_OPTIONS, SERVER_OPTIONS, ChannelOptions
from fedloom.plans import TrainableTensor
from tests.integration import federation as federations
from tests.integration.federation import Federation

_HERE = Path(__file__).parent
HASTE = 30  # how much sooner impatient peers give a connection up: 1 s, ping, 0.67 s


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


def hasty(options: ChannelOptions, haste: int = HASTE) -> ChannelOptions:
    """Return options whose keepalive is scaled; its proportions stay."""
    scaled = {
        "grpc.keepalive_time_ms",
        "grpc.keepalive_timeout_ms",
        "grpc.http2.ping_timeout_ms",
    }
    return [(key, int(value) // haste if key in scaled else value) for key, value in options]


@pytest.fixture
def hasty_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let agents notice a dead connection in seconds."""
    monkeypatch.setattr("edge_agent.connection.CLIENT_OPTIONS", hasty(CLIENT_OPTIONS))


@pytest.fixture
def hasty_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the coordinator notice a dead connection in seconds."""
    monkeypatch.setattr("coordinator.server.SERVER_OPTIONS", hasty(SERVER_OPTIONS))


def parts_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let everybody send parts of this size: updates of tests are small."""
    monkeypatch.setattr("fedloom.artifacts.FIRST_PART_BYTES", size)
    monkeypatch.setattr("fedloom.artifacts.UNPROVEN_PART_BYTES", size)


def parameters_of(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let plans have so many parameters."""
    monkeypatch.setattr(federations, "LAYOUT", (TrainableTensor("values", (count,), 0),))
    monkeypatch.setattr(federations, "PARAMETERS", count)


@pytest.fixture
def large_updates(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let plain updates be larger than gRPC's windows; return how many bytes they have."""
    parameters_of(monkeypatch, 150_000)
    return 600_000


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let updates of 200 KB travel in parts of 4 KiB; return the size of a part."""
    parameters_of(monkeypatch, 50_000)
    parts_of(monkeypatch, 4096)
    return 4096


@pytest.fixture
def admission(monkeypatch: pytest.MonkeyPatch) -> list[Admission]:
    """Return where every coordinator that is started puts what it counts."""
    found: list[Admission] = []

    class Watched(Admission):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            found.append(self)

    monkeypatch.setattr("coordinator.server.Admission", Watched)
    return found


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
