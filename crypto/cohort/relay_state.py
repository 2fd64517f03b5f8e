"""What can happen to an attempt at the coordinator, what it wants done, and what it remembers."""

from dataclasses import dataclass, field
from enum import IntEnum

from ..masks import Correction
from .messages import (
    Acceptance,
    AttemptId,
    Boxes,
    Certificate,
    Cohort,
    Endorsement,
    Message,
    Release,
)


class RelayPhase(IntEnum):
    """How far the attempt is."""

    SHARING = 0
    COLLECTING = 1
    VOUCHING = 2
    RELEASING = 3
    CORRECTED = 4
    ABANDONED = 5


@dataclass(frozen=True)
class CloseSharing:
    """Ours: who has not dealt its shares by now is missing."""

    attempt: AttemptId


@dataclass(frozen=True)
class Uploaded:
    """Ours: this member's update is in the total, and has this hash."""

    attempt: AttemptId
    slot: int
    sha256: bytes


@dataclass(frozen=True)
class CloseUploads:
    """Ours: nothing is added to the total any more."""

    attempt: AttemptId


@dataclass(frozen=True)
class CloseVouching:
    """Ours: who has not vouched by now will not."""

    attempt: AttemptId


@dataclass(frozen=True)
class CloseReleases:
    """Ours: what was not released by now is to be recovered from shares."""

    attempt: AttemptId


RelayEvent = (
    Boxes
    | CloseSharing
    | Uploaded
    | CloseUploads
    | Endorsement
    | CloseVouching
    | Release
    | CloseReleases
)


@dataclass(frozen=True)
class Send:
    """Send a message to a member."""

    agent_id: str
    message: Message


@dataclass(frozen=True)
class Correct:
    """The total can be encoded: `accumulator.result(correction)`."""

    correction: Correction


@dataclass(frozen=True)
class Abandon:
    """The attempt is over without a sum. The survivors may join the next attempt of the round."""

    survivors: tuple[str, ...]


RelayEffect = Send | Correct | Abandon


@dataclass(frozen=True)
class RelayState:
    """What the relay remembers; nothing of it is more than the coordinator was told anyway."""

    cohort: Cohort
    phase: RelayPhase = RelayPhase.SHARING
    boxes: dict[int, Boxes] = field(default_factory=dict)  # by sender's slot
    uploads: dict[int, bytes] = field(default_factory=dict)  # SHA-256 by slot
    acceptance: Acceptance | None = None
    endorsements: dict[int, Endorsement] = field(default_factory=dict)
    certificate: Certificate | None = None
    releases: dict[int, Release] = field(default_factory=dict)

    @property
    def attempt(self) -> AttemptId:
        """The attempt that this is."""
        return self.cohort.attempt
