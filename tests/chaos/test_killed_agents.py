"""Agents that are killed again and again, at random instants: the run ends as undisturbed.

What they are about when they die is read from their own status: training, encoding and uploading,
vouching, applying.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.chaos.sealed_run import KILLS, SAMPLES, adapter_of, queue, undisturbed
from tests.integration.federation import Agent, Federation
from tests.integration.processes import Process, process

TRAINING_SECONDS = 0.2
STEPS = ("training", "uploading", "vouching", "applying", "waiting")
LONGEST_PAUSE_SECONDS = 0.05  # after the agent has begun a step
PATIENCE_SECONDS = 3.0  # for an agent to come to a step
END_SECONDS = 120


@pytest.mark.timeout(900)
async def test_the_adapter_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    for name in ("undisturbed", "killed"):
        await asyncio.to_thread((tmp_path / name).mkdir)
    expected = await undisturbed(tmp_path / "undisturbed")
    federation = Federation(tmp_path / "killed")
    try:
        await federation.start()
        agents = await federation.enrol_all(SAMPLES)
        queue(federation)
        async with AsyncExitStack() as stack:
            lives = Lives(stack, agents, tmp_path)
            await lives.kill_often()
            await lives.end()
        assert await adapter_of(federation, agents) == expected
    finally:
        await federation.close()
    print(f"killed {lives.steps}")
    assert sum(lives.steps.values()) >= KILLS
    assert len(lives.steps) >= 3 or KILLS < 50


class Lives:
    """The agents' processes, one after another for each agent."""

    def __init__(self, stack: AsyncExitStack, agents: list[Agent], folder: Path) -> None:
        self._stack = stack
        self._agents = agents
        self._folder = folder
        self._processes: dict[str, Process] = {}
        self.steps: Counter[str] = Counter()  # what agents were about when they were killed

    async def kill_often(self) -> None:
        """Start everybody, then kill one and start it again, until that was often enough."""
        for agent in self._agents:
            await self._start(agent)
        chance = random.Random(11)  # noqa: S311 - instants, not secrets
        for _ in range(KILLS):
            agent = chance.choice(self._agents)
            await _about_to(agent, chance.choice(STEPS))
            await asyncio.sleep(chance.uniform(0.0, LONGEST_PAUSE_SECONDS))
            running = self._processes[agent.name]
            if running.returncode is not None:
                assert running.returncode == 0
                break  # the run is over
            running.kill()
            await running.wait()
            self.steps[_step(agent)] += 1
            await self._start(agent)

    async def end(self) -> None:
        """Wait until every agent has ended well."""
        for running in self._processes.values():
            assert await asyncio.wait_for(running.wait(), END_SECONDS) == 0

    async def _start(self, agent: Agent) -> None:
        log = self._folder / f"{agent.name}.log"
        program = ("-m", "tests.integration.agent_process", agent.home)
        started = process(log, *program, str(agent.engine.samples), str(TRAINING_SECONDS))
        self._processes[agent.name] = await self._stack.enter_async_context(started)


async def _about_to(agent: Agent, step: str) -> None:
    """Wait until the agent is at the step, but not for long: it may not come there any more."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while _step(agent) != step:  # noqa: ASYNC110 - a file of another process
                await asyncio.sleep(0.002)


def _step(agent: Agent) -> str:
    """Return what the agent was about, by its last word."""
    path = agent.home / "status.json"
    if not path.exists():
        return "starting"
    return str(json.loads(path.read_text())["step"])
