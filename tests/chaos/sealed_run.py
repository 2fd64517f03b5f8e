"""One sealed run of four agents under a fixed id: undisturbed, or with processes killed."""

import hashlib
import os
import time
from pathlib import Path

from coordinator.premises import open_published
from coordinator.run_state import Phase
from fedloom.plans import ADAPTER_FILE
from tests.integration.federation import Agent, Federation

KILLS = int(os.environ.get("FEDLOOM_KILLS", "50"))
RUN_ID = bytes(range(16))
SAMPLES = (30, 50, 100, 64)
ROUNDS = 24
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


def queue(federation: Federation) -> None:
    """Queue the run under a fixed id: data order and rounding follow from it."""
    _, reference = open_published(federation.home).put_plan(federation.folder / "plan")
    federation.store.add_run(RUN_ID, "toy", RUN_FILE, reference, time.time())


async def undisturbed(folder: Path) -> str:
    """Return the digest of the adapter that nobody's death has touched."""
    federation = Federation(folder)
    try:
        await federation.start()
        agents = await federation.enrol_all(SAMPLES)
        queue(federation)
        for agent in agents:
            agent.start()
        for agent in agents:
            await agent.finished()
        return await adapter_of(federation, agents)
    finally:
        await federation.close()


async def adapter_of(federation: Federation, agents: list[Agent]) -> str:
    """Return the one digest of what all agents exported, after a run that lost nothing."""
    assert (await federation.run_over(RUN_ID)).phase is Phase.COMPLETED
    rounds = federation.store.rounds(RUN_ID)
    assert [entry.round for entry in rounds] == list(range(1, ROUNDS + 1))
    assert all(entry.slots == (0, 1, 2, 3) for entry in rounds)  # nobody lost, nobody twice
    exported = {
        hashlib.sha256(exported_adapter(agent).read_bytes()).hexdigest() for agent in agents
    }
    assert len(exported) == 1
    return exported.pop()


def exported_adapter(agent: Agent) -> Path:
    """Return the file that a device has at the run's end."""
    return agent.model(RUN_ID) / ADAPTER_FILE
