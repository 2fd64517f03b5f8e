"""What a run remembers: the state that `coordinator.rounds` moves from event to event."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fedloom.errors import Reason


class Phase(Enum):
    """What the run waits for."""

    GATHERING = "gathering"
    TRAINING = "training"
    COLLECTING = "collecting"
    SUMMING = "summing"
    APPLYING = "applying"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self in (Phase.COMPLETED, Phase.FAILED)


@dataclass(frozen=True)
class RunPolicy:
    """What the operator asked for; times in seconds."""

    rounds: int
    minimum_agents: int
    cohort_size: int  # most agents invited to one round
    needs_key: bool
    gathering_seconds: float
    training_seconds: float
    upload_seconds: float
    applying_seconds: float
    seed: int = 0


@dataclass(frozen=True)
class RunState:
    """Everything that decides what happens next; its sets and maps are never changed in place."""

    policy: RunPolicy
    deadline: float
    phase: Phase = Phase.GATHERING
    round: int = 1
    attempt: int = 0  # of this round's latest cohort; never used twice
    failures: int = 0  # of this round
    connected: frozenset[str] = frozenset()
    excluded: Mapping[str, Reason] = field(default_factory=dict)  # until they connect again
    key_holders: frozenset[str] = frozenset()
    key_asked: str | None = None  # the agent that shall wrap the run key
    key_recipients: frozenset[str] = frozenset()  # whom it shall wrap it for
    key_deadline: float = 0.0
    invited: frozenset[str] = frozenset()
    ready: Mapping[str, int] = field(default_factory=dict)  # agent -> weight class
    cohort: tuple[str, ...] = ()  # index = slot
    uploaded: Mapping[str, bytes] = field(default_factory=dict)  # agent -> SHA-256 of its upload
    applied: Mapping[str, bytes] = field(default_factory=dict)  # agent -> SHA-256 of its state
    reason: Reason | None = None  # why the run failed

    @property
    def weight_cap(self) -> int:
        """Upper bound of a member's weight: 2^(largest weight class in the cohort)."""
        return 1 << max(self.ready[agent] for agent in self.cohort)
