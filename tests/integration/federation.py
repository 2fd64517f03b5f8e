"""A federation on loopback: a coordinator in this process or its own, agents that really joined."""

import asyncio
import hashlib
import io
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import structlog
from typer.testing import CliRunner

from coordinator.app import app
from coordinator.conductor import Conductor
from coordinator.premises import load_server_config, open_published, open_store, write_server_config
from coordinator.server import keep_conducting, serving
from coordinator.store import RunRecord, Store
from edge_agent.availability import ALWAYS
from edge_agent.enrolment import join
from edge_agent.identity import Identity
from edge_agent.model_versions import ModelMaker
from edge_agent.participation import Device
from edge_agent.session import Session
from edge_agent.statements import Statement
from fedloom.adapters import Theta, adapter_header, read_adapter, write_adapter
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan, PlanMember, PlanOrigin, TrainableTensor
from fedloom.quality import Report
from fedloom.tasks import TextClassification
from fedloom.terms import Protection, Release
from fedloom.v1 import control_pb2
from tests.integration.engines import FakeEngine

LAYOUT = (
    TrainableTensor("classifier.weight", (2, 2400), 0),
    TrainableTensor("classifier.bias", (200,), 4800),
)
PARAMETERS = 5000
ORIGIN = PlanOrigin("none")
PATIENCE_SECONDS = 60.0  # a bound for what must happen on a busy machine, never a measurement
_T = TypeVar("_T")


async def until(what: str, condition: Callable[[], _T | None]) -> _T:
    """Return the condition's first value that is neither None nor False."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"expected {what} within {PATIENCE_SECONDS} s")


class _Stderr(io.TextIOBase):
    """Whatever stands in for standard error when a line is logged."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)


# Commands run in this process, beside the coordinator: what it logs is not what they print.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(_Stderr()))


def command(*arguments: str | Path) -> str:
    """Run a `fedloom-coordinator` command in this process and return what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout.strip()


def write_plan(folder: Path) -> Plan:
    """Make a plan that holds an adapter and nothing that could be trained."""
    folder.mkdir()
    adapter = folder / ADAPTER_FILE
    theta = np.random.default_rng(7).normal(0, 0.1, PARAMETERS).astype(np.float32)
    write_adapter(adapter, LAYOUT, theta)
    plan = Plan(
        "toy",
        (
            PlanMember(
                ADAPTER_FILE,
                len(adapter_header(LAYOUT)) + 4 * PARAMETERS,
                hashlib.sha256(adapter.read_bytes()).digest(),
            ),
        ),
        LAYOUT,
        TextClassification(("no", "yes"), 16, 0),
        ORIGIN,
    )
    (folder / PLAN_FILE).write_bytes(plan.encode())
    return plan


class Agent:
    """One device: its home, its identity, a session that can be started and cut."""

    def __init__(self, home: Path, identity: Identity, engine: FakeEngine) -> None:
        self.home = home
        self.identity = identity
        self.engine = engine
        self.name = identity.agent_id
        self.minimum_protection = Protection.PLAIN
        self.permitted_release = Release.AGENTS
        self.permitted_report = Report.MEAN
        self.availability = ALWAYS
        self.protections = frozenset(Protection)
        self.models = ModelMaker(home / "models", identity.agent_id, identity.identity_key)
        self._session: Session | None = None
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin a session; a second one is a process that was started again."""
        device = Device(
            self.home,
            self.identity,
            self.minimum_protection,
            lambda folder, plan: self.engine,
            self.models,
            self.permitted_release,
            permitted_report=self.permitted_report,
            availability=self.availability,
        )
        self._session = Session(device, self.protections)
        self._running = asyncio.create_task(self._session.run())

    async def stop(self) -> None:
        """Vanish: nothing is said to the coordinator, the connection breaks."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
            self._running = None

    async def ended(self) -> BaseException:
        """Return what ended the session by itself."""
        assert self._running is not None
        await asyncio.wait({self._running}, timeout=PATIENCE_SECONDS)
        assert self._running.done(), "expected the session to end"
        error = self._running.exception()
        assert error is not None
        return error

    async def finished(self) -> control_pb2.Finished:
        """Return how the run ended for this agent; an agent's own failure is raised here."""
        assert self._session is not None
        assert self._running is not None
        told = asyncio.create_task(self._session.finished.get())
        await asyncio.wait(
            {told, self._running},
            timeout=PATIENCE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not told.done():
            told.cancel()
            if self._running.done():
                self._running.result()
            raise AssertionError(f"{self.name}: expected to hear that the run is over")
        return told.result()

    def theta(self, run_id: bytes) -> Theta:
        """Return the model that this device had at the run's end."""
        return read_adapter(self.model(run_id) / ADAPTER_FILE, LAYOUT)

    def model(self, run_id: bytes) -> Path:
        """Return the folder of the run's last model."""
        [adapter] = self.models.adapters()
        said = self.models.versions(adapter)[-1]
        assert isinstance(said, Statement)
        assert said.run == run_id.hex()
        return self.models.path(adapter, said.version)


class Federation:
    """A coordinator's home, the coordinator in this process, and everybody who joined."""

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        authority: Path | None = None,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.home = folder / "coordinator"
        self.agents: list[Agent] = []
        self.conductor: Conductor | None = None
        self._serving = AsyncExitStack()
        self._conducting: asyncio.Task[None] | None = None
        self.control_port, self.enrolment_port = free_ports(2)
        command(
            *("init", "--home", self.home, "--address", host),
            *("--listen", f"[{host}]" if ":" in host else host),
            *("--control-port", str(self.control_port)),
            *("--enrolment-port", str(self.enrolment_port)),
            *(() if authority is None else ("--authority", authority)),
        )
        write_server_config(self.home, replace(load_server_config(self.home), **settings))
        self.plan = write_plan(folder / "plan")
        self.store: Store = open_store(self.home)

    async def start(self) -> None:
        """Serve and conduct, on the same home as before if there was one."""
        self.conductor = await self._serving.enter_async_context(serving(self.home))
        self._conducting = asyncio.create_task(keep_conducting(self.conductor, False))

    def gave_up(self) -> bool:
        """Whether the coordinator has ended by itself."""
        return self._conducting is not None and self._conducting.done()

    async def stop(self) -> None:
        """Stop the coordinator; raises what ended it early."""
        conducting, self._conducting = self._conducting, None
        if conducting is not None:
            failed = conducting.done()
            conducting.cancel()
            await asyncio.wait({conducting})
            await self._serving.aclose()
            if failed:
                conducting.result()

    async def close(self) -> None:
        """End everything."""
        for agent in self.agents:
            agent.engine.may_finish.set()
        await asyncio.gather(*(agent.stop() for agent in self.agents))
        await self.stop()
        self.store.close()

    def invite(self, name: str, hours: float = 1.0) -> str:
        """Return a token."""
        return command("invite", "--name", name, "--home", self.home, "--hours", str(hours))

    async def enrol(self, name: str, samples: int = 32) -> Agent:
        """Let a device join; it is not connected yet."""
        home = self.folder / f"{name}-{len(self.agents)}"
        agent = Agent(home, await join(home, self.invite(name)), FakeEngine(samples))
        self.agents.append(agent)
        return agent

    async def enrol_all(self, samples: Sequence[int] = (30, 50, 100)) -> list[Agent]:
        """Let several devices join."""
        return [await self.enrol(f"agent-{i}", count) for i, count in enumerate(samples)]

    def start_run(
        self,
        kind: str,
        rounds: int,
        minimum: int = 3,
        optimizer: str = "adamw",
        **deadlines: float,
    ) -> bytes:
        """Queue a run as an operator does and return its id."""
        file = self.folder / "run.toml"
        lines = [
            'name = "toy"\nplan = "plan"',
            f"rounds = {rounds}\n[cohort]\nminimum = {minimum}\nsize = 10",
            f'[training]\nlearning_rate = 1e-2\noptimizer = "{optimizer}"',
            f'[protection]\nkind = "{kind}"\n[deadlines]',
            *(f"{name} = {seconds}" for name, seconds in deadlines.items()),
        ]
        file.write_text("\n".join(lines))
        return bytes.fromhex(command("run", "start", file, "--home", self.home))

    async def connected(self, agents: Sequence[Agent]) -> None:
        """Wait until the coordinator has admitted all of these."""
        conductor = self.conductor
        assert conductor is not None
        names = {agent.name for agent in agents}
        await until(
            f"{names} to connect", lambda: names <= {s.agent_id for s in conductor._sessions}
        )

    async def gone(self, agent: Agent) -> None:
        """Wait until the coordinator has noticed that this agent's connection is broken."""
        conductor = self.conductor
        assert conductor is not None
        await until("the cut to be noticed", lambda: conductor._sessions.get(agent.name) is None)

    def run(self, run_id: bytes) -> RunRecord:
        """Return the run as stored."""
        return self.store.run(run_id)

    async def run_over(self, run_id: bytes) -> RunRecord:
        """Wait for the run's end."""
        await until("the run to end", lambda: self.run(run_id).phase.over)
        return self.run(run_id)

    def initial_theta(self) -> Theta:
        """Return the plan's adapter."""
        return read_adapter(self.folder / "plan" / ADAPTER_FILE, LAYOUT)

    @contextmanager
    def tampered(self, sha256: bytes) -> Iterator[Path]:
        """Flip a bit of a published artifact, and back."""
        path = open_published(self.home).path(sha256)
        right = path.read_bytes()
        path.unlink()  # it may be a hard link to the operator's own plan
        path.write_bytes(bytes([right[0] ^ 1]) + right[1:])
        yield path
        path.write_bytes(right)


def weighted_mean(agents: Sequence[Agent], theta: Theta) -> Theta:
    """Average what the agents trained from one state, in float64."""
    updates = [agent.engine.update_from(theta) for agent in agents]
    total = np.sum([np.float64(u.samples) * u.delta for u in updates], axis=0)
    mean: Theta = (total / sum(u.samples for u in updates)).astype(np.float32)
    return mean


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports
