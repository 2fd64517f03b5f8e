"""What can happen to an attempt at the coordinator, what it wants done, and what it remembers."""

import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum

from ..errors import MalformedMessage
from ..masks import Correction
from .decoding import Fields, decode
from .messages import (
    Acceptance,
    Advertisement,
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

    ADVERTISING = 0
    SHARING = 1
    COLLECTING = 2
    VOUCHING = 3
    RELEASING = 4
    CORRECTED = 5
    ABANDONED = 6


@dataclass(frozen=True)
class FormCohort:
    """Ours: everyone who advertised so far is the cohort."""

    attempt: AttemptId


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
    Advertisement
    | FormCohort
    | Boxes
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
    """Everything to be stored; it holds nothing that the coordinator could not have kept anyway."""

    attempt: AttemptId
    minimum: int
    phase: RelayPhase = RelayPhase.ADVERTISING
    advertised: dict[str, Advertisement] = field(default_factory=dict)
    cohort: Cohort | None = None
    boxes: dict[int, Boxes] = field(default_factory=dict)  # by sender's slot
    uploads: dict[int, bytes] = field(default_factory=dict)  # SHA-256 by slot
    acceptance: Acceptance | None = None
    endorsements: dict[int, Endorsement] = field(default_factory=dict)
    certificate: Certificate | None = None
    releases: dict[int, Release] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Write the state: attempt, phase, and the messages so far."""
        single = (self.cohort, self.acceptance, self.certificate)
        groups = (self.advertised, self.boxes, self.endorsements, self.releases)
        messages = [message.encode() for message in single if message is not None]
        messages += [message.encode() for group in groups for message in group.values()]
        a = self.attempt
        start = b"FDLR\1" + struct.pack(
            "<B16sIHHH", self.phase, a.run_id, a.round, a.attempt, self.minimum, len(self.uploads)
        )
        rows = [struct.pack("<H32s", slot, sha256) for slot, sha256 in self.uploads.items()]
        return start + b"".join(rows + [struct.pack("<I", len(m)) + m for m in messages])

    @classmethod
    def decode(cls, encoded: bytes) -> "RelayState":
        """Read what `encode` wrote; raises MalformedMessage for what it did not."""
        fields = Fields(encoded)
        if fields.take(5) != b"FDLR\1" or (phase := fields.number(1)) > RelayPhase.ABANDONED:
            raise MalformedMessage("state of a relay", "magic, version and phase", "others")
        attempt = AttemptId(fields.take(16), fields.number(4), fields.number(2))
        state = cls(attempt, fields.number(2), RelayPhase(phase))
        for row in fields.rows(fields.number(2), 34):
            state.uploads[int.from_bytes(row[:2], "little")] = row[2:]
        while not fields.done:
            state = _restored(state, decode(fields.sized()))
        return state


def _restored(state: RelayState, message: Message) -> RelayState:
    match message:
        case Advertisement():
            return replace(state, advertised={**state.advertised, message.agent_id: message})
        case Cohort():
            return replace(state, cohort=message)
        case Boxes():
            return replace(state, boxes={**state.boxes, message.slot: message})
        case Acceptance():
            return replace(state, acceptance=message)
        case Endorsement():
            return replace(state, endorsements={**state.endorsements, message.slot: message})
        case Certificate():
            return replace(state, certificate=message)
        case Release():
            return replace(state, releases={**state.releases, message.slot: message})
