"""What a run remembers: the state that `coordinator.rounds` moves from event to event."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from coordinator.plateau import BEGINNING, NO_PLATEAU, Plateau, PlateauRule
from coordinator.run_keys import Grant, RunKeys
from coordinator.selection import UNIFORM, Selection, Traits
from fedloom.errors import Reason
from fedloom.quality import Quality


class Phase(Enum):
    """What the run waits for."""

    GATHERING = "gathering"
    TRAINING = "training"
    COLLECTING = "collecting"
    SUMMING = "summing"
    APPLYING = "applying"
    RETURNING = "returning"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self in (Phase.COMPLETED, Phase.FAILED)


class Wish(Enum):
    """What the operator wants of a run that is not over."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(frozen=True)
class RunPolicy:
    """What the operator asked for; times in seconds."""

    rounds: int
    minimum_agents: int
    cohort_size: int  # most agents in one round's cohort
    needs_key: bool
    gathering_seconds: float
    training_seconds: float
    upload_seconds: float
    applying_seconds: float
    seed: int = 0
    has_masks: bool = False
    quorum: int = 0  # ready agents that suffice for a cohort; 0: all who were invited
    returns_sums: bool = False  # agents hand the opened sums over
    plateau: PlateauRule = NO_PLATEAU
    buffer: int = 0  # asynchronous: ready agents that make a cohort; 0: rounds are synchronous
    max_staleness: int = 0  # most rounds by which an update may be older than its sum's state
    selection: Selection = UNIFORM

    @property
    def is_asynchronous(self) -> bool:
        """Whether a round is for whoever is ready first, and for no one else."""
        return self.buffer > 0

    @property
    def enough(self) -> int:
        """Ready agents that suffice for a cohort; 0: all who were invited are waited for."""
        cut_off = self.cohort_size if self.selection.has_cut_off else 0
        return self.buffer or self.quorum or cut_off


@dataclass(frozen=True)
class StateReport:
    """What an agent says of its state after a round: the same for all honest agents."""

    state_sha256: bytes
    next_clip: float = 0.0  # 0: the run states its own
    opened_sha256: bytes = b""  # of the opened sum, where it is returned
    quality: Quality | None = None  # that the sum opened to, where it is told


@dataclass(frozen=True)
class RunState:
    """Everything that decides what happens next; its sets and maps are never changed in place."""

    policy: RunPolicy
    deadline: float
    phase: Phase = Phase.GATHERING
    round: int = 1  # rises with every round, void ones included
    previous_round: int = 0  # the last one in the run's history
    completed: int = 0  # number of rounds in the run's history
    attempt: int = 0  # of this round's latest cohort; never used twice
    failures: int = 0  # in a row, since the last round that was completed
    paused: bool = False
    connected: frozenset[str] = frozenset()
    excluded: Mapping[str, Reason] = field(default_factory=dict)  # until they connect again
    keys: RunKeys = field(default_factory=RunKeys)
    past_keys: frozenset[int] = frozenset()  # that the run's history is encrypted under
    grant: Grant | None = None  # that an agent was asked for and has not given
    grant_deadline: float = 0.0
    plateau: Plateau = BEGINNING
    clip: float = 0.0  # of the next cohort; 0: follows from its weight cap
    invited: frozenset[str] = frozenset()
    ready: Mapping[str, int] = field(default_factory=dict)  # agent -> weight class
    staleness: Mapping[str, int] = field(default_factory=dict)  # of updates of those who are ready
    cohort: tuple[str, ...] = ()  # index = slot
    uploaded: Mapping[str, bytes] = field(default_factory=dict)  # agent -> SHA-256 of its upload
    applied: Mapping[str, StateReport] = field(default_factory=dict)
    agreed: StateReport | None = None  # what most agents say, once the round is applied
    returning: str = ""  # the agent that was asked for the opened sum
    returners: tuple[str, ...] = ()  # who may be asked next
    reason: Reason | None = None  # why the run failed
    traits: Mapping[str, Traits] = field(default_factory=dict)  # of those connected, if they told
    recent: tuple[frozenset[str], ...] = ()  # whom the last finished rounds invited
    began: float = 0.0  # when the open round, or the last one, invited
    round_seconds: float = 0.0  # from the last round's invitations to its end; 0: there was none

    @property
    def weight_cap(self) -> int:
        """Upper bound of a member's weight: 2^(largest weight class in the cohort)."""
        return 1 << max(self.ready[agent] for agent in self.cohort)

    @property
    def appliers(self) -> frozenset[str]:
        """Who tells of its state once the sum is there: whom the round is for.

        In an asynchronous run these are the sum's members, since the others train; everybody who is
        here, where no member is.
        """
        if not self.policy.is_asynchronous:
            return self.invited
        members = frozenset(self.uploaded)
        heard = members & (self.connected | set(self.applied))
        return members if heard - set(self.excluded) else members | self.connected

    def takes(self, round_number: int) -> bool:
        """Whether an agent's word on its training for this round decides something now.

        Always, in a synchronous run: what does not fit is refused. In an asynchronous one an agent
        that trains cannot know that a round went on without it; the next invitation asks it again.
        """
        in_time = self.phase is Phase.TRAINING and round_number == self.round
        return in_time or not self.policy.is_asynchronous

    @property
    def candidates(self) -> frozenset[str]:
        """Who is here and has not declined."""
        return self.connected - set(self.excluded)
