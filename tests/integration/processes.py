"""The coordinator and agents as processes of their own, each with a log file."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.integration.federation import Agent, Federation

ROOT = Path(__file__).resolve().parents[2]
Process = asyncio.subprocess.Process


@asynccontextmanager
async def process(log: Path, *arguments: str | Path) -> AsyncIterator[Process]:
    """Run Python with these arguments; its output goes to the end of the log."""
    with log.open("ab") as file:
        started = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, cwd=ROOT, stdout=file, stderr=file
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


@asynccontextmanager
async def coordinator(federation: Federation, log: Path) -> AsyncIterator[Process]:
    """Serve the federation's home in a process; it ends with the last run."""
    home = federation.home
    program = "from coordinator.app import main; main()"
    arguments = ("-c", program, "serve", "--home", home, "--until-idle", "--json")
    async with process(log, *arguments) as started:
        yield started


@asynccontextmanager
async def agent_processes(agents: list[Agent], folder: Path) -> AsyncIterator[list[Process]]:
    """Run each agent in a process with a log `<name>.log` in the folder."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                process(
                    folder / f"{agent.name}.log",
                    "-m",
                    "tests.integration.agent_process",
                    agent.home,
                    str(agent.engine.samples),
                )
            )
            for agent in agents
        ]
