"""A coordinator that is killed again and again, at random instants: the run ends as undisturbed.

`FEDLOOM_KILLS` sets how often. The seed is fixed; where the kills fall is up to the machine.
"""

import asyncio
import functools
import hashlib
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from coordinator.run_state import Phase
from coordinator.server import open_published
from edge_agent import connection, session, transfer
from fedloom.channels import CLIENT_OPTIONS
from fedloom.plans import ADAPTER_FILE
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation, until
from tests.integration.processes import coordinator

KILLS = int(os.environ.get("FEDLOOM_KILLS", "50"))
RUN_ID = bytes(range(16))
SAMPLES = (30, 50, 100, 64)
ROUNDS = 12
LONGEST_LIFE_SECONDS = 0.9
RUN_FILE = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = 4
size = 10
[training]
learning_rate = 1e-2
[protection]
kind = "sealed"
"""


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
    undisturbed, _ = await final_adapter(tmp_path / "undisturbed", kills=0)
    survived, phases = await final_adapter(tmp_path / "killed", kills=KILLS)
    assert sum(phases.values()) == KILLS
    assert len(phases) >= 3 or KILLS < 50
    print(f"killed in {dict(phases)}")
    assert survived == undisturbed


async def final_adapter(folder: Path, kills: int) -> tuple[str, Counter[str]]:
    """Run the same run; return the digest of everybody's final adapter, and where kills fell."""
    await asyncio.to_thread(folder.mkdir)
    federation = Federation(folder)
    phases: Counter[str] = Counter()
    try:
        await federation.start()
        agents = await federation.enrol_all(SAMPLES)
        await federation.stop()
        queue(federation)
        for agent in agents:
            agent.engine.seconds = 0.15 if kills else 0.0
            agent.start()
        phases = await kill_often(federation, folder / "coordinator.log", kills)
        async with coordinator(federation, folder / "coordinator.log"):
            return await everybody_s_adapter(federation, agents), phases
    finally:
        await federation.close()


def queue(federation: Federation) -> None:
    """Queue the run under a fixed id: data order and rounding follow from it."""
    _, reference = open_published(federation.home).put_plan(federation.folder / "plan")
    federation.store.add_run(RUN_ID, "toy", RUN_FILE, reference, time.time())


async def kill_often(federation: Federation, log: Path, kills: int) -> Counter[str]:
    """Start the coordinator and kill it, again and again."""
    chance = random.Random(7)  # noqa: S311 - instants, not secrets
    phases: Counter[str] = Counter()
    for _ in range(kills):
        starts = served(log)
        async with coordinator(federation, log) as process:
            await until("the coordinator to serve", functools.partial(has_served, log, starts))
            await asyncio.sleep(chance.uniform(0.0, LONGEST_LIFE_SECONDS))
            process.kill()
            await process.wait()
        record = federation.run(RUN_ID)
        phases[record.phase.value] += 1
    return phases


def has_served(log: Path, starts: int) -> bool:
    """Say whether a coordinator serves that did not before."""
    return served(log) > starts


def served(log: Path) -> int:
    """Count how often a coordinator has begun to serve."""
    return log.read_text().count('"serving"') if log.exists() else 0


async def everybody_s_adapter(federation: Federation, agents: list[Agent]) -> str:
    """Wait for the run's end; return the one digest of what all agents exported."""
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    record = await federation.run_over(RUN_ID)
    assert record.phase is Phase.COMPLETED
    rounds = federation.store.rounds(RUN_ID)
    assert [entry.round for entry in rounds] == list(range(1, ROUNDS + 1))
    assert all(entry.slots == (0, 1, 2, 3) for entry in rounds)  # nobody lost, nobody twice
    exported = {
        hashlib.sha256(
            (agent.home / "models" / RUN_ID.hex() / ADAPTER_FILE).read_bytes()
        ).hexdigest()
        for agent in agents
    }
    assert len(exported) == 1
    return exported.pop()
