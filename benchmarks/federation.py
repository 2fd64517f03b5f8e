"""The product itself, from the outside: its commands, its processes, its log and its store."""

import hashlib
import json
import shutil
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Case, Rounds, Usage
from benchmarks.processes import Children, Failed, free_port, run, usage
from coordinator.store import Store
from fedloom.adapters import write_adapter
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan, PlanMember, PlanOrigin, TrainableTensor
from fedloom.tasks import TextClassification

START_SECONDS = 60.0
ROUND_SECONDS = 120.0
_POLL_SECONDS = 0.02
_COMMANDS = Path(sys.executable).parent
_COORDINATOR = str(_COMMANDS / "fedloom-coordinator")
_AGENT = str(_COMMANDS / "fedloom-agent")


class Federation:
    """A coordinator and its enrolled agents, as folders; every case runs on a copy of them."""

    def __init__(self, folder: Path, agents: int) -> None:
        """Enrol the agents as a user does."""
        self.homes = [folder / f"agent-{number}" for number in range(agents)]
        self.coordinator = folder / "coordinator"
        ports = f"--control-port={free_port()}", f"--enrolment-port={free_port()}"
        addresses = "--address=127.0.0.1", "--listen=127.0.0.1"
        run([_COORDINATOR, "init", f"--home={self.coordinator}", *addresses, *ports])
        with Children() as children:
            log = EventLog(folder / "enrolment.log")
            children.start(_serve(self.coordinator), log.path)
            log.wait_for("serving", children, START_SECONDS)
            for home in self.homes:
                name = f"--name={home.name}"
                token = run([_COORDINATOR, "invite", name, f"--home={self.coordinator}"])
                run([_AGENT, "--home", str(home), "join", token])

    def measure(self, case: Case, folder: Path) -> Rounds:
        """Run a case in a new folder, which is removed."""
        try:
            home = folder / "coordinator"
            shutil.copytree(self.coordinator, home)
            agents = [
                Path(shutil.copytree(agent, folder / agent.name))
                for agent in self.homes[: case.agents]
            ]
            make_plan(folder / "plan", case.parameters)
            (folder / "run.toml").write_text(_run_file(case))
            run_id = run([_COORDINATOR, "run", "start", str(folder / "run.toml"), f"--home={home}"])
            with Children() as children:
                return _measure(case, bytes.fromhex(run_id), home, agents, children)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class EventLog:
    """The coordinator's log, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self._offset = 0

    def wait_for(self, event: str, children: Children, seconds: float) -> None:
        """Wait until an event has been logged once more; raises Failed."""
        seen = self._count(event)
        end = time.monotonic() + seconds
        while self._count(event) == seen:
            children.check()
            if time.monotonic() > end:
                raise Failed(f"expected {event!r} within {seconds:.0f} s: {self.events[-3:]}")
            time.sleep(_POLL_SECONDS)
            self.read()

    def moments(self, event: str, **facts: object) -> list[float]:
        """Return when the event was logged with these facts, in seconds since the epoch."""
        return [
            datetime.fromisoformat(line["timestamp"]).timestamp()
            for line in self.events
            if line["event"] == event and all(line.get(key) == facts[key] for key in facts)
        ]

    def _count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.events)

    def read(self) -> None:
        """Take in what was logged since."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self.events += [json.loads(line) for line in whole.splitlines()]


def make_plan(folder: Path, parameters: int) -> None:
    """Write a plan of one tensor: there is nothing in it to train with."""
    folder.mkdir(parents=True)
    layout = (TrainableTensor("values", (parameters,), 0),)
    adapter = folder / ADAPTER_FILE
    write_adapter(adapter, layout, np.zeros(parameters, np.float32))
    with adapter.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    member = PlanMember(ADAPTER_FILE, adapter.stat().st_size, digest)
    task = TextClassification(("off", "on"), max_tokens=8, pad_token_id=0)
    plan = Plan("benchmark", (member,), layout, task, PlanOrigin("none"))
    (folder / PLAN_FILE).write_bytes(plan.encode())


def _serve(home: Path) -> list[str]:
    return [_COORDINATOR, "serve", f"--home={home}", "--json"]


def _run_file(case: Case) -> str:
    return (
        f'name = "benchmark"\nplan = "plan"\nrounds = {case.rounds + 1}\n'
        f"[cohort]\nminimum = {case.agents}\n"
        f'[protection]\nkind = "{case.protection}"\n'
    )


def _measure(
    case: Case, run_id: bytes, home: Path, agents: list[Path], children: Children
) -> Rounds:
    log = EventLog(home.with_name("coordinator.log"))
    pids = [children.start(_serve(home), log.path)]
    log.wait_for("serving", children, START_SECONDS)
    for agent in agents:
        command = [sys.executable, "-m", "benchmarks.constant_agent", str(agent), case.protection]
        pids.append(children.start(command, agent.with_suffix(".log")))
    log.wait_for("round finished", children, START_SECONDS + ROUND_SECONDS)
    before, rounds_before = [usage(pid) for pid in pids], len(log.moments("round finished"))
    log.wait_for("run finished", children, ROUND_SECONDS * case.rounds)
    after, rounds_after = [usage(pid) for pid in pids], len(log.moments("round finished"))
    if not log.moments("run finished", phase="completed"):
        raise Failed(f"the run failed: {log.events[-5:]}")
    used = [
        _per_round(*both, rounds_after - rounds_before) for both in zip(before, after, strict=True)
    ]
    return Rounds(
        *_durations(log, case.rounds),
        *_traffic(home, run_id),
        used[0],
        max(used[1:], key=lambda one: one.peak_bytes),
    )


def _per_round(before: Usage, after: Usage, rounds: int) -> Usage:
    return Usage(after.peak_bytes, (after.cpu_seconds - before.cpu_seconds) / max(1, rounds))


def _durations(log: EventLog, rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """Return the seconds of the measured rounds, whole and by phase; the first one warms up."""
    ends = log.moments("round finished")
    phases = ("training", "collecting", "summing", "applying")
    starts = {phase: log.moments("run moved", phase=phase)[-rounds:] for phase in phases}
    closing = dict(pairwise(phases))
    return [end - start for start, end in pairwise(ends)], {
        phase: [
            end - start
            for start, end in zip(
                starts[phase],
                starts[closing[phase]] if phase in closing else ends[-rounds:],
                strict=True,
            )
        ]
        for phase in phases
    }


def _traffic(home: Path, run_id: bytes) -> tuple[int, int]:
    """Return the last round's payload bytes, up and down, of the agent with most."""
    store = Store(home / "store.sqlite")
    reports = store.reports(run_id)
    store.close()
    last = [report for report in reports if report["round"] == reports[-1]["round"]]
    up, down = (max(report[key] for report in last) for key in ("sent_bytes", "received_bytes"))
    return up, down
