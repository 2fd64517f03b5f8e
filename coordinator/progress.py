"""How a run is doing: read from the store, and from the process that executes it, if any.

What was reported of a closed round does not change any more, so a reader keeps it: to look at a run
of many rounds and agents each half second costs what its open round costs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coordinator.run_state import Phase, RunState
from coordinator.summaries import RunSummary, Stage
from fedloom.errors import Reason

if TYPE_CHECKING:
    from coordinator.store import RoundRecord, Store

SATURATION_WARNING = 0.001  # share of values that were clipped
_BEHIND = {stage: place for place, stage in enumerate(Stage)}


@dataclass(frozen=True)
class RoundProgress:
    """One round, as agents reported it; bytes are payload of artifacts."""

    round: int
    seconds: float | None = None  # None while it is open
    agents: int = 0
    training_loss: float | None = None  # mean over agents
    evaluated: int = 0
    correct: int = 0
    summed: int = 0
    saturated: int = 0
    saturated_share: float | None = None  # of all values; None while it is not known
    sent_bytes: int = 0
    senders: int = 0
    received_bytes: int = 0
    receivers: int = 0
    quality: tuple[tuple[str, float], ...] = ()  # means by metric, of the model it began with

    @property
    def accuracy(self) -> float | None:
        """Over the held-out rows of all agents that reported theirs, after the round."""
        return self.correct / self.evaluated if self.evaluated else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "round": self.round,
            "seconds": self.seconds,
            "agents": self.agents,
            "training_loss": self.training_loss,
            "accuracy": self.accuracy,
            "evaluated": self.evaluated,
            "summed": self.summed,
            "saturated": self.saturated,
            "saturated_share": self.saturated_share,
            "sent_bytes_per_agent": mean(self.sent_bytes, self.senders),
            "received_bytes_per_agent": mean(self.received_bytes, self.receivers),
            "began_with": dict(self.quality) or None,
        }


@dataclass(frozen=True)
class AgentProgress:
    """One agent's part in a round; bytes are None while it is open."""

    agent: str
    stage: Stage
    progress: float = 0.0
    training_loss: float | None = None
    evaluated: int = 0
    correct: int = 0
    sent_bytes: int | None = None
    received_bytes: int | None = None
    refusal: Reason | None = None

    @property
    def accuracy(self) -> float | None:
        """On the agent's own held-out rows."""
        return self.correct / self.evaluated if self.evaluated else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "agent": self.agent,
            "stage": self.stage.value,
            "progress": self.progress,
            "training_loss": self.training_loss,
            "accuracy": self.accuracy,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "refusal": None if self.refusal is None else self.refusal.name,
        }


@dataclass(frozen=True)
class OpenPhase:
    """What the open phase waits for, as the process that executes the run knows."""

    done: int = 0
    expected: int = 0
    deadline: float | None = None  # seconds since 1970, by the coordinator's clock
    behind: bytes | None = None  # the run that has to be over first
    connected: int = 0


@dataclass(frozen=True)
class RunProgress:
    """A run and its rounds so far; `agents` may be a part of those whom `stages` counts."""

    run: RunSummary
    coordinator_reads: str
    open_phase: OpenPhase | None = None  # None when nobody executes the run
    history: tuple[RoundProgress, ...] = ()
    agents: tuple[AgentProgress, ...] = ()
    stages: Mapping[Stage, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        phase = self.open_phase
        return {
            **self.run.to_json(),
            "coordinator_reads": self.coordinator_reads,
            "waits_for": None
            if phase is None
            else {
                "done": phase.done,
                "expected": phase.expected,
                "deadline": phase.deadline,
                "behind": None if phase.behind is None else phase.behind.hex(),
                "connected": phase.connected,
            },
            "history": [entry.to_json() for entry in self.history],
            "stages": {stage.value: count for stage, count in self.stages.items()},
            "participants": [agent.to_json() for agent in self.agents],
        }


class ProgressReader:
    """Reads one run again and again."""

    def __init__(self, store: "Store", run_id: bytes) -> None:
        self._store = store
        self._run_id = run_id
        self._closed: dict[int, RoundProgress] = {}

    def read(
        self,
        run: RunSummary,
        coordinator_reads: str,
        agent_limit: int,
        state: RunState | None = None,
        open_phase: OpenPhase | None = None,
    ) -> RunProgress:
        """Read what is stored by now; `state` is the run's as it is executed, if it is."""
        first = max(self._closed, default=0)  # that one too: it is what the agents' list shows
        rows: dict[int, list[dict[str, Any]]] = {}
        for row in self._store.reports(self._run_id, first):
            if row["round"] > 0:
                rows.setdefault(row["round"], []).append(row)
        records = {record.round: record for record in self._store.rounds(self._run_id)}
        numbers = sorted({*rows, *records} - set(self._closed))
        latest = {
            number: _round(number, rows.get(number, []), records.get(number)) for number in numbers
        }
        history = (*self._closed.values(), *latest.values())
        # The last round stays open to late reports; those before it do not change any more.
        last = max(latest, default=0)
        self._closed |= {number: entry for number, entry in latest.items() if number < last}
        shown = max(last, 0 if state is None else state.round)
        agents = _agents(rows.get(shown, []), state if state and state.round == shown else None)
        return RunProgress(
            run,
            coordinator_reads,
            open_phase,
            history,
            tuple(agents[:agent_limit]),
            _counted(agents),
        )


def merged(older: RunProgress | None, newer: RunProgress) -> RunProgress:
    """Return the newer state with the rounds that it left out because they did not change."""
    if older is None:
        return newer
    rounds = {entry.round: entry for entry in (*older.history, *newer.history)}
    return replace(newer, history=tuple(rounds[number] for number in sorted(rounds)))


def _counted(agents: Iterable[AgentProgress]) -> dict[Stage, int]:
    counts = Counter(agent.stage for agent in agents)
    return {stage: counts[stage] for stage in Stage if counts[stage]}


def _round(
    number: int, rows: Sequence[dict[str, Any]], record: "RoundRecord | None"
) -> RoundProgress:
    losses = [row["training_loss"] for row in rows if row["training_loss"] is not None]
    sent = [row["sent_bytes"] for row in rows if row["sent_bytes"]]
    received = [row["received_bytes"] for row in rows if row["received_bytes"]]
    shares = [row["saturated_share"] for row in rows if row["saturated_share"] is not None]
    return RoundProgress(
        round=number,
        seconds=None if record is None or not record.seconds else record.seconds,
        agents=len(rows),
        training_loss=_training_loss(losses, record),
        evaluated=sum(row["evaluated"] or 0 for row in rows),
        correct=sum(row["correct"] or 0 for row in rows),
        summed=0 if record is None else len(record.slots),
        saturated=max((row["saturated"] or 0 for row in rows), default=0),
        saturated_share=max(shares, default=None),
        sent_bytes=sum(sent),
        senders=len(sent),
        received_bytes=sum(received),
        receivers=len(received),
        quality=() if record is None else record.quality,
    )


def _training_loss(losses: Sequence[float], record: "RoundRecord | None") -> float | None:
    """Return the mean that the sum opened to, or that of what agents said each."""
    if losses:
        return sum(losses) / len(losses)
    return None if record is None else record.training_loss


def _agents(rows: Sequence[dict[str, Any]], state: RunState | None) -> list[AgentProgress]:
    """Return the round's agents, those that are furthest behind first."""
    known = {row["agent_id"]: _agent(row, state) for row in rows}
    invited = () if state is None else state.invited
    silent = [AgentProgress(name, Stage.INVITED) for name in invited if name not in known]
    return sorted((*known.values(), *silent), key=lambda a: (_BEHIND[a.stage], a.progress, a.agent))


def _agent(row: Mapping[str, Any], state: RunState | None) -> AgentProgress:
    return AgentProgress(
        row["agent_id"],
        _stage(row, state),
        row["progress"] or 0.0,
        row["training_loss"],
        row["evaluated"] or 0,
        row["correct"] or 0,
        row["sent_bytes"],
        row["received_bytes"],
        None if row["refusal"] is None else Reason(row["refusal"]),
    )


def _stage(row: Mapping[str, Any], state: RunState | None) -> Stage:
    reached = (
        (Stage.APPLIED, row["state_sha256"] is not None),
        (Stage.DECLINED, row["refusal"] is not None),
        (Stage.UPLOADED, state is not None and row["agent_id"] in state.uploaded),
        (Stage.READY, row["training_seconds"] is not None),
        (Stage.TRAINING, bool(row["progress"])),
    )
    return next((stage for stage, is_reached in reached if is_reached), Stage.INVITED)


def open_phase(state: RunState | None, connected: int, behind: bytes | None) -> OpenPhase:
    """Say what a run's phase waits for; `state` is None while another run is executed."""
    if state is None:
        return OpenPhase(behind=behind, connected=connected)
    done, expected = _counts(state)
    waits_for_ever = state.phase is Phase.SUMMING or (
        state.paused and state.phase is Phase.GATHERING
    )
    deadline = None if waits_for_ever else state.deadline
    return OpenPhase(done, expected, deadline, None, connected)


def _counts(state: RunState) -> tuple[int, int]:
    match state.phase:
        case Phase.GATHERING:
            return len(state.connected), state.policy.minimum_agents
        case Phase.TRAINING:
            return len(state.ready), len(state.invited)
        case Phase.COLLECTING:
            return len(state.uploaded), len(state.cohort)
        case Phase.SUMMING:
            return len(state.uploaded), len(state.uploaded)
        case Phase.APPLYING:
            return len(state.applied), len(state.uploaded)
        case Phase.RETURNING:
            return 0, 1
        case Phase.COMPLETED | Phase.FAILED:
            return 0, 0


def mean(total: int, count: int) -> float | None:
    """Return the mean, or None of nothing."""
    return total / count if count else None
