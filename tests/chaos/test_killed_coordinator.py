"""A coordinator that is killed again and again, at random instants: the run ends as undisturbed.

`FEDLOOM_KILLS` sets how often. The seed is fixed; where the kills fall is up to the machine.
"""

import asyncio
import functools
import random
from collections import Counter
from pathlib import Path

import pytest

from edge_agent import connection, session, transfer
from fedloom.channels import CLIENT_OPTIONS
from fedloom.v1 import control_pb2
from tests.chaos.sealed_run import KILLS, RUN_ID, SAMPLES, adapter_of, queue, undisturbed
from tests.integration.federation import Federation, until
from tests.integration.processes import coordinator

LONGEST_LIFE_SECONDS = 0.9


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have agents come back soon, so that kills fall into rounds and not into pauses."""
    monkeypatch.setattr(session, "LAST_BACKOFF_SECONDS", 0.3)
    monkeypatch.setattr(transfer, "LAST_BACKOFF_SECONDS", 0.3)
    options = [option for option in CLIENT_OPTIONS if "reconnect_backoff" not in option[0]]
    soon = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300)]
    monkeypatch.setattr(connection, "CLIENT_OPTIONS", [*options, *soon])


@pytest.mark.usefixtures("impatient")
@pytest.mark.timeout(900)
async def test_the_adapter_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    for name in ("undisturbed", "killed"):
        await asyncio.to_thread((tmp_path / name).mkdir)
    expected = await undisturbed(tmp_path / "undisturbed")
    federation = Federation(tmp_path / "killed")
    try:
        await federation.start()
        agents = await federation.enrol_all(SAMPLES)
        await federation.stop()
        queue(federation)
        for agent in agents:
            agent.engine.seconds = 0.15
            agent.start()
        phases = await kill_often(federation, tmp_path / "coordinator.log")
        async with coordinator(federation, tmp_path / "coordinator.log"):
            for agent in agents:
                assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
            assert await adapter_of(federation, agents) == expected
    finally:
        await federation.close()
    print(f"killed in {dict(phases)}")
    assert sum(phases.values()) == KILLS
    assert len(phases) >= 3 or KILLS < 50


async def kill_often(federation: Federation, log: Path) -> Counter[str]:
    """Start the coordinator and kill it, again and again; return in which phases."""
    chance = random.Random(7)  # noqa: S311 - instants, not secrets
    phases: Counter[str] = Counter()
    for _ in range(KILLS):
        starts = served(log)
        async with coordinator(federation, log) as process:
            await until("the coordinator to serve", functools.partial(has_served, log, starts))
            await asyncio.sleep(chance.uniform(0.0, LONGEST_LIFE_SECONDS))
            process.kill()
            await process.wait()
        phases[federation.run(RUN_ID).phase.value] += 1
    return phases


def has_served(log: Path, starts: int) -> bool:
    """Say whether a coordinator serves that did not before."""
    return served(log) > starts


def served(log: Path) -> int:
    """Count how often a coordinator has begun to serve."""
    return log.read_text().count('"serving"') if log.exists() else 0
