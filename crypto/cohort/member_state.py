"""What can happen to a member, what it answers, and what it must remember across restarts."""

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from ..errors import IllegalStep, MalformedMessage
from .decoding import Fields, decode
from .identity import Sign, Verify
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
from .shamir import SHARE_SIZE


class MemberPhase(IntEnum):
    """How far this member is in its attempt."""

    IDLE = 0
    ADVERTISED = 1
    SHARING = 2
    MASKED = 3
    UPLOADING = 4
    ENDORSED = 5
    RELEASED = 6


@dataclass(frozen=True)
class Join:
    """Ours: take part in this attempt; `secret` is 32 fresh random bytes."""

    attempt: AttemptId
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class UploadReady:
    """Ours: the encoded update has this hash, and is about to leave."""

    attempt: AttemptId
    sha256: bytes


MemberEvent = Join | Cohort | Boxes | UploadReady | Acceptance | Certificate
Answer = Advertisement | Boxes | Endorsement | Release


@dataclass(frozen=True)
class MemberPolicy:
    """What this device insists on, whatever the coordinator says."""

    minimum: int = 3  # fewest updates in a round that this device's update is part of
    groups: int = 1  # sums that these are in, with at least `groups.MINIMUM_GROUP` in each of them


@dataclass(frozen=True)
class MemberTools:
    """What the member needs from the device: its identity, and whom it trusts."""

    sign: Sign
    verify: Verify
    policy: MemberPolicy = MemberPolicy()


@dataclass(frozen=True)
class MemberState:
    """Everything to be stored, 0600 and atomically: it holds the secrets of the open attempt."""

    agent_id: str
    attempt: AttemptId
    phase: MemberPhase = MemberPhase.IDLE
    secret: bytes = field(default=b"", repr=False)  # of the attempt; empty once released
    cohort: Cohort | None = None
    received: tuple[bytes, ...] = field(default=(), repr=False)  # both shares of each other member
    upload: bytes = b""  # SHA-256
    acceptance: Acceptance | None = None
    release: Release | None = None

    @property
    def slot(self) -> int:
        """Our place in the cohort; raises IllegalStep where there is none yet."""
        slot = None if self.cohort is None else self.cohort.slot(self.agent_id)
        if slot is None:
            raise IllegalStep("cohort", "one with us in it", "none")
        return slot

    def encode(self) -> bytes:
        """Write the state, for the disk of this device only."""
        messages = (self.cohort, self.acceptance, self.release)
        texts = (self.agent_id.encode(), self.secret, self.upload, b"".join(self.received))
        fields = (*texts, *(b"" if m is None else m.encode() for m in messages))
        a = self.attempt
        start = b"FDLT\1" + struct.pack("<B16sIH", self.phase, a.run_id, a.round, a.attempt)
        return start + b"".join(struct.pack("<I", len(f)) + f for f in fields)

    @classmethod
    def decode(cls, encoded: bytes) -> "MemberState":
        """Read what `encode` wrote; raises MalformedMessage for a file that it did not write."""
        fields = Fields(encoded)
        if fields.take(5) != b"FDLT\1" or (phase := fields.number(1)) > MemberPhase.RELEASED:
            raise MalformedMessage("state of a member", "magic, version and phase", "others")
        attempt = AttemptId(fields.take(16), fields.number(4), fields.number(2))
        name, secret, upload, received = (fields.sized() for _ in range(4))
        cohort, acceptance, release = (_stored(fields.sized()) for _ in range(3))
        fields.end()
        pairs = Fields(received).rows(len(received) // (2 * SHARE_SIZE), 2 * SHARE_SIZE)
        if (
            not isinstance(cohort, Cohort | None)
            or not isinstance(acceptance, Acceptance | None)
            or not isinstance(release, Release | None)
        ):
            raise MalformedMessage("state of a member", "a cohort, a list, a release", "others")
        agent_id = name.decode(errors="replace")
        known = secret, cohort, pairs, upload, acceptance, release
        return cls(agent_id, attempt, MemberPhase(phase), *known)


def new_member(agent_id: str, run_id: bytes) -> MemberState:
    """Return the state before the first attempt. Only where none is stored for this run!"""
    return MemberState(agent_id, AttemptId(run_id, 0, 0))


def _stored(encoded: bytes) -> Message | None:
    return decode(encoded) if encoded else None
