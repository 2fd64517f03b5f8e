"""How a run is doing: read from the store, so that any process can look; drawn or printed."""

import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from coordinator.config import parse_run_config
from coordinator.run_state import Phase
from coordinator.store import RunRecord, Store
from fedloom.privacy import PrivacyTerms, privacy_statement
from fedloom.terms import Protection

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class AgentProgress:
    """One agent's part in a round; bytes are payload of artifacts, as the coordinator counted."""

    agent: str
    progress: float
    sent_bytes: int | None
    received_bytes: int | None
    training_loss: float | None
    accuracy: float | None
    refusal: int | None


@dataclass(frozen=True)
class RoundProgress:
    """One round; accuracy is over the held-out rows of all agents that have some."""

    round: int
    seconds: float | None  # None while it is open
    training_loss: float | None  # mean over agents
    accuracy: float | None
    evaluated: int
    saturated: int
    agents: tuple[AgentProgress, ...]


@dataclass(frozen=True)
class RunProgress:
    """A run and its rounds so far."""

    run_id: str
    name: str
    phase: Phase
    reason: str | None
    rounds: int
    protection: Protection
    coordinator_reads: str
    history: tuple[RoundProgress, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {
            "phase": self.phase.value,
            "protection": self.protection.name.lower(),
        }


def read_progress(store: Store, record: RunRecord) -> RunProgress:
    """Read a run's progress."""
    run_id = record.run_id
    config = parse_run_config(tomllib.loads(record.config), Path(record.name))
    protection = config.encoding.protection
    privacy = privacy_statement(PrivacyTerms(protection, config.release, config.cohort.minimum))
    finished = {row.round: row for row in store.rounds(run_id) if row.seconds}
    reports: dict[int, list[dict[str, Any]]] = {}
    for report in store.reports(run_id):
        reports.setdefault(report["round"], []).append(report)
    history = tuple(
        _round(number, finished[number].seconds if number in finished else None, rows)
        for number, rows in sorted(reports.items())
        if number > 0
    )
    return RunProgress(
        run_id.hex(),
        record.name,
        record.phase,
        None if record.reason is None else record.reason.name,
        config.rounds,
        protection,
        privacy.coordinator_reads,
        history,
    )


def _round(number: int, seconds: float | None, rows: list[dict[str, Any]]) -> RoundProgress:
    losses = [row["training_loss"] for row in rows if row["training_loss"] is not None]
    evaluated = sum(row["evaluated"] or 0 for row in rows)
    correct = sum(row["correct"] or 0 for row in rows)
    return RoundProgress(
        number,
        seconds,
        sum(losses) / len(losses) if losses else None,
        correct / evaluated if evaluated else None,
        evaluated,
        max((row["saturated"] or 0 for row in rows), default=0),
        tuple(_agent(row) for row in rows),
    )


def _agent(row: dict[str, Any]) -> AgentProgress:
    return AgentProgress(
        row["agent_id"],
        row["progress"] or 0.0,
        row["sent_bytes"],
        row["received_bytes"],
        row["training_loss"],
        row["correct"] / row["evaluated"] if row["evaluated"] else None,
        row["refusal"],
    )


def show(progress: RunProgress) -> RenderableType:
    """Draw the run as a table with a row for each round."""
    table = Table(title=escape(f"run {progress.name}"))
    for heading in ("round", "accuracy", "loss", "seconds", "up/agent", "down/agent"):
        table.add_column(heading, justify="right")
    table.add_column("coordinator\ncould read", no_wrap=True)
    for entry in progress.history:
        table.add_row(
            f"{entry.round}/{progress.rounds}",
            "" if entry.accuracy is None else f"{entry.accuracy:.1%}",
            "" if entry.training_loss is None else f"{entry.training_loss:.3f}",
            "" if entry.seconds is None else f"{entry.seconds:.1f}",
            _mean_bytes([agent.sent_bytes for agent in entry.agents]),
            _mean_bytes([agent.received_bytes for agent in entry.agents]),
            progress.coordinator_reads if entry.seconds is not None else "",
        )
    return Group(table, _footer(progress))


def _footer(progress: RunProgress) -> Text:
    line = progress.phase.value
    if progress.reason:
        line += f": {progress.reason}"
    elif progress.phase is Phase.TRAINING and progress.history:
        shares = [f"{a.agent} {a.progress:.0%}" for a in progress.history[-1].agents]
        line += ": " + ", ".join(shares)
    return Text(line)


def _mean_bytes(values: list[int | None]) -> str:
    known = [value for value in values if value]
    return f"{sum(known) / len(known) / 1e6:.2f} MB" if known else ""


def watch(store: Store, first: RunProgress, console: Console) -> RunProgress:
    """Follow a run to its end: live on a terminal, a line for each change elsewhere."""
    if console.is_terminal:
        with Live(show(first), console=console, refresh_per_second=4) as live:
            for last in _follow(store, first):
                live.update(show(last))
        return last
    told = ""
    for last in _follow(store, first):
        if (line := _line(last)) != told:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            told = line
    console.print(show(last))
    return last


def _follow(store: Store, first: RunProgress) -> Iterator[RunProgress]:
    progress = first
    while True:
        yield progress
        if progress.phase.over:
            return
        time.sleep(POLL_SECONDS)
        progress = read_progress(store, store.run(bytes.fromhex(first.run_id)))


def _line(progress: RunProgress) -> str:
    if not progress.history:
        return f"run {progress.name}: {progress.phase.value}"
    entry = progress.history[-1]
    parts = [f"run {progress.name}: round {entry.round}/{progress.rounds}"]
    parts.append(progress.phase.value)
    if entry.accuracy is not None:
        parts.append(f"accuracy {entry.accuracy:.1%}")
    elif entry.seconds is None:
        done = sum(agent.progress for agent in entry.agents) / len(entry.agents)
        parts.append(f"trained {25 * int(4 * done)}%")
    return ", ".join(parts)
