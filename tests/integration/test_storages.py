"""Whole runs over other places than a file and a folder, and over places that fail for a while."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.premises import open_published
from coordinator.run_state import Phase
from fedloom.adapters import read_adapter
from fedloom.errors import Refused
from fedloom.plans import ADAPTER_FILE
from tests.coordinator.object_server import ObjectServer, object_server
from tests.coordinator.postgresql import PostgresServer, postgres_server
from tests.integration.federation import (
    LAYOUT,
    Agent,
    Federation,
    command,
    until,
    weighted_mean,
)
from tests.small_disk import mounted


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with object_server(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
async def serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    """Return what starts a federation with settings of its own."""
    monkeypatch.setattr("coordinator.server.SHUTDOWN_SECONDS", 0.1)
    monkeypatch.setattr("coordinator.server.STORAGE_SECONDS", 0.2)
    monkeypatch.setattr("coordinator.conductor.TICK_SECONDS", 0.05)
    monkeypatch.setattr("edge_agent.session.LAST_BACKOFF_SECONDS", 0.4)
    async with AsyncExitStack() as closing:

        async def start(**settings: str) -> Federation:
            federation = Federation(tmp_path, **settings)
            closing.push_async_callback(federation.close)
            await federation.start()
            return federation

        yield start


async def completes(federation: Federation, run_id: bytes, agents: list[Agent]) -> None:
    """Expect that the run ends as if nothing had happened to it."""
    record = await federation.run_over(run_id)
    assert (record.phase, record.reason) == (Phase.COMPLETED, None)
    expected = federation.initial_theta()
    for _ in federation.store.rounds(run_id):
        expected = expected + weighted_mean(agents, expected)
    for agent in agents:
        await agent.finished()
        assert np.array_equal(agent.theta(run_id), expected)


async def paused_in_round_two(federation: Federation) -> tuple[bytes, list[Agent]]:
    """Begin a run whose first agent takes its time in the second round."""
    agents: list[Agent] = await federation.enrol_all()
    agents[0].engine.pauses_at = 2
    run_id = federation.start_run("plain", rounds=3)
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    return run_id, agents


def is_waiting(federation: Federation) -> bool:
    """Whether the conductor has let go of the run."""
    assert federation.conductor is not None
    return federation.conductor._open is None


def invite_for_ever(federation: Federation) -> None:
    """Invite; the database may have room that it does not use yet."""
    while True:
        federation.invite("late")


async def test_a_run_over_a_database_server_and_a_bucket(
    serve: Callable[..., Any],
    postgresql: PostgresServer,
    objects: ObjectServer,
    tmp_path: Path,
) -> None:
    with postgresql.database() as url:
        bucket = f"s3://{objects.bucket()}/fedloom"
        federation = await serve(store=url, artifacts=bucket, artifacts_endpoint=objects.endpoint)
        agents = await federation.enrol_all()
        run_id = federation.start_run("plain", rounds=2)
        for agent in agents:
            agent.start()
        await completes(federation, run_id, agents)
        published = open_published(federation.home)
        records = federation.store.rounds(run_id)
        assert [published.size(r.sum.sha256) for r in records] == [
            r.sum.size_bytes for r in records
        ]
        assert list((federation.home / "artifacts").glob("*")) == []
        command("run", "export", "--home", federation.home, "--out", tmp_path / "model")
        exported = read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT)
        assert np.array_equal(exported, agents[0].theta(run_id))
        await federation.close()


async def test_a_database_server_that_was_away_for_a_while(
    serve: Callable[..., Any],
) -> None:
    with postgres_server() as server, server.database() as url:
        federation = await serve(store=url)
        run_id, agents = await paused_in_round_two(federation)
        server.stop()
        agents[0].engine.may_finish.set()
        await until("the run to wait", lambda: is_waiting(federation))
        with pytest.raises(Refused, match="INTERNAL"):
            command("run", "list", "--home", federation.home)
        assert not federation.gave_up()
        server.start()
        await completes(federation, run_id, agents)
        await federation.close()


async def test_a_disk_that_was_full_for_a_while(serve: Callable[..., Any], tmp_path: Path) -> None:
    with mounted(tmp_path / "coordinator", kibibytes=16_384) as disk:
        federation = await serve()
        run_id, agents = await paused_in_round_two(federation)
        disk.fill()
        with pytest.raises(Refused, match="STORAGE_FULL"):
            invite_for_ever(federation)
        agents[0].engine.may_finish.set()
        await until("the run to wait", lambda: is_waiting(federation))
        assert not federation.gave_up()
        disk.free()
        await completes(federation, run_id, agents)
        await federation.close()
