"""What an operator is told of runs, agents, invitations and plans: frozen values, in short.

Times are seconds since 1970. Names of runs and plans, labels and reasons of bans may hold any
character: `coordinator.commands.output` makes them safe for a terminal.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from coordinator.run_state import Phase, Wish
from fedloom.errors import Reason, Refused
from fedloom.terms import Protection, Release

DEFAULT_PAGE = 100
MAX_PAGE = 1_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Page(Generic[_T]):
    """Part of a list; `next_token` is empty on the last page."""

    items: tuple[_T, ...]
    next_token: str = ""


@dataclass(frozen=True)
class RunSummary:
    """A run, in short."""

    run_id: bytes
    name: str
    phase: Phase
    reason: Reason | None
    wish: Wish
    round: int  # of the open one, or of the last; void ones are counted
    completed: int  # rounds in its history
    rounds: int
    agents: int  # in the last sum, or, before there is one, that reported something
    created_at: float
    plan_id: bytes
    protection: Protection | None  # None: its stored file cannot be read by this version
    release: Release | None
    early_end: str = ""  # why it is completed before its rounds are done

    @property
    def state(self) -> str:
        """The phase, or what the operator has made of the run."""
        if self.reason is Reason.RUN_CANCELLED:
            return "cancelled"
        if self.phase.over or self.wish is Wish.RUN:
            return self.phase.value
        if self.wish is Wish.CANCEL:
            return "being cancelled"
        return "paused" if self.phase is Phase.GATHERING else f"{self.phase.value}, then paused"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "run": self.run_id.hex(),
            "name": self.name,
            "phase": self.phase.value,
            "reason": None if self.reason is None else self.reason.name,
            "wish": self.wish.value,
            "round": self.round,
            "completed": self.completed,
            "rounds": self.rounds,
            "agents": self.agents,
            "created_at": self.created_at,
            "plan": self.plan_id.hex(),
            "protection": _name(self.protection),
            "release": _name(self.release),
            "early_end": self.early_end or None,
        }


@dataclass(frozen=True)
class AgentSummary:
    """An enrolled agent."""

    agent_id: str
    enrolled_at: float
    certificate_until: float | None = None
    last_seen: float | None = None
    connected: bool = False
    banned_at: float | None = None
    ban_reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = asdict(self)
        return {"agent": values.pop("agent_id"), **values}


@dataclass(frozen=True)
class InvitationSummary:
    """An invitation, without what would let anyone use it."""

    invitation_id: str
    agent_id: str
    expires_at: float
    uses: int = 1
    used: int = 0
    revoked_at: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = asdict(self)
        return {
            "invitation": values.pop("invitation_id"),
            "agent": values.pop("agent_id"),
            **values,
        }


@dataclass(frozen=True)
class PlanPart:
    """The trainable tensors of one role."""

    role: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class PlanSummary:
    """A plan; `damage` says what is wrong with its files."""

    plan_id: bytes
    name: str = ""
    base_model: str = ""
    parameters: int = 0
    labels: int = 0
    max_tokens: int = 0
    files: tuple[tuple[str, int], ...] = ()  # (name, bytes)
    runs: int = 0
    damage: str = ""
    task: str = ""
    parts: tuple[PlanPart, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "id": self.plan_id.hex(),
            "task": self.task,
            "base_model": self.base_model,
            "parameters": self.parameters,
            "labels": self.labels,
            "max_tokens": self.max_tokens,
            "layout": {part.role: part.parameters for part in self.parts},
            "members": dict(self.files),
            "runs": self.runs,
            "damage": self.damage or None,
        }


@dataclass(frozen=True)
class PrivacyReport:
    """Who learns what from a run, and the terms that it follows from."""

    run: RunSummary
    minimum: int
    authority_is_offline: bool
    lines: tuple[tuple[str, str], ...]  # (party, what it can read)
    coordinator_reads: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "run": self.run.run_id.hex(),
            "name": self.run.name,
            "protection": _name(self.run.protection),
            "release": _name(self.run.release),
            "minimum": self.minimum,
            "authority_is_offline": self.authority_is_offline,
            "coordinator_reads": self.coordinator_reads,
            "parties": [{"party": party, "learns": learns} for party, learns in self.lines],
        }


def _name(member: Enum | None) -> str | None:
    return None if member is None else member.name.lower()


class Stage(Enum):
    """How far an agent is in a round, in order; declining is apart."""

    INVITED = "invited"
    TRAINING = "training"
    READY = "ready"
    UPLOADED = "uploaded"
    APPLIED = "applied"
    DECLINED = "declined"


def page(items: Iterable[_T], key: Callable[[_T], str], size: int, token: str) -> Page[_T]:
    """Cut a page out of a list whose keys are unique; `token` is the key of the one before it."""
    size = min(size or DEFAULT_PAGE, MAX_PAGE)
    cut: list[_T] = []
    begun = not token
    for item in items:
        if len(cut) == size:
            return Page(tuple(cut), key(cut[-1]))
        if begun:
            cut.append(item)
        begun = begun or key(item) == token
    if not begun:
        raise Refused(Reason.MALFORMED, "expected a page_token of this list: list it again")
    return Page(tuple(cut))
