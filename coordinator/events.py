"""What can happen to a run, and what the run wants done: the alphabet of `coordinator.rounds`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.run_keys import Grant
from coordinator.run_state import Wish
from coordinator.selection import UNKNOWN, Traits
from fedloom.errors import Reason
from fedloom.quality import Quality


@dataclass(frozen=True)
class Evaluation:
    """Quality on an agent's held-out rows."""

    count: int
    correct: int
    mean_loss: float


# Events: from agents, unless marked as ours.


@dataclass(frozen=True)
class TakenUp:
    """The coordinator opened the run, anew or after a restart, with the agents here. Ours."""

    agents: frozenset[str]
    traits: Mapping[str, Traits] = field(default_factory=dict)  # of those who told


@dataclass(frozen=True)
class AgentConnected:
    """An agent that can take part opened its stream."""

    agent: str
    traits: Traits = UNKNOWN


@dataclass(frozen=True)
class AgentDisconnected:
    """The agent's stream ended."""

    agent: str


@dataclass(frozen=True)
class KeyShared:
    """The agent that was asked wrapped the run key; envelopes are opaque, by recipient."""

    agent: str
    key_id: int
    envelopes: Mapping[str, bytes]


@dataclass(frozen=True)
class Ready:
    """The agent has an update for the round."""

    agent: str
    round: int
    weight_class: int
    training_loss: float | None = None
    training_seconds: float = 0.0
    advertisement: bytes = b""  # under masks, with the identity that signed it
    identity: bytes = b""  # IdentityKey, serialised
    base_rounds: int = 0  # asynchronous: applied to the state that the update was made from


@dataclass(frozen=True)
class Declined:
    """The agent cannot do the step that it was asked for."""

    agent: str
    round: int
    reason: Reason


@dataclass(frozen=True)
class Uploaded:
    """The agent's update was verified and added to the sum. Ours."""

    agent: str
    sha256: bytes


@dataclass(frozen=True)
class SumStored:
    """The sum of the accepted updates is history and can be fetched. Ours."""


@dataclass(frozen=True)
class SumFailed:
    """The sum could not be stored. Ours."""


@dataclass(frozen=True)
class Applied:
    """The agent's global state includes the round."""

    agent: str
    round: int
    state_sha256: bytes
    evaluation: Evaluation | None = None
    saturated: int = 0
    next_clip: float = 0.0
    opened_sha256: bytes = b""
    quality: Quality | None = None  # of the state before, over the round's agents


@dataclass(frozen=True)
class SumReturned:
    """The opened sum is here, with the hash that the agents report. Ours."""

    agent: str


@dataclass(frozen=True)
class AgentRemoved:
    """The operator banned the agent. Ours."""

    agent: str


@dataclass(frozen=True)
class Wished:
    """The operator wants the run to go on, to pause before its next round, or to end. Ours."""

    wish: Wish


@dataclass(frozen=True)
class Tick:
    """Time passed. Ours."""


Event = (
    TakenUp
    | AgentConnected
    | AgentDisconnected
    | KeyShared
    | Ready
    | Declined
    | Uploaded
    | SumStored
    | SumFailed
    | Applied
    | SumReturned
    | AgentRemoved
    | Wished
    | Tick
)


# Effects: what the conductor does.


@dataclass(frozen=True)
class ShareKey:
    """Ask an agent to wrap a run key for others."""

    grant: Grant


@dataclass(frozen=True)
class Invite:
    """Invite these agents to the round."""

    agents: frozenset[str]


@dataclass(frozen=True)
class OpenCohort:
    """Start a sum for the state's cohort and tell its members."""


@dataclass(frozen=True)
class RepeatCohort:
    """Tell a member about the open cohort again."""

    agent: str


@dataclass(frozen=True)
class CloseCohort:
    """Tell the members which updates are in, and store the sum."""


@dataclass(frozen=True)
class PublishResult:
    """Tell these agents where the sum is."""

    agents: frozenset[str]


@dataclass(frozen=True)
class AskForSum:
    """Ask an agent for the opened sum."""

    agent: str


@dataclass(frozen=True)
class AbandonRound:
    """Forget the round's updates: they are asked for again, or the round is void."""


@dataclass(frozen=True)
class CloseRound:
    """The round is part of the run's history; agents told what quality it opened to."""

    quality: Quality | None = None


@dataclass(frozen=True)
class FinishRun:
    """Tell everybody that the run is over."""


@dataclass(frozen=True)
class Reject:
    """Refuse an agent's step."""

    agent: str
    reason: Reason
    subject: str


Effect = (
    ShareKey
    | Invite
    | OpenCohort
    | RepeatCohort
    | CloseCohort
    | PublishResult
    | AskForSum
    | AbandonRound
    | CloseRound
    | FinishRun
    | Reject
)
