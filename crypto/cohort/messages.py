"""What members and the coordinator say to each other, and how it is written. Little-endian.

Every message starts with 28 bytes: `FDLC`, version u8 = 1, kind u8, run id(16), round u32,
attempt u16. Then

    1 advertisement  member → all      id length u8, id(UTF-8), mask key(32), share key(32),
                                       commitment(32), signature(64)
    2 cohort         coordinator → all minimum u16, n u16, n x what follows the 28 bytes above
    3 boxes          member → relay →  slot u16, n - 1 u16, (n - 1) x box(82), by ascending slot of
                                       the other member; slot: whose boxes these are, the sender's
                                       on the way up, the recipient's on the way down
    4 acceptance     coordinator → all cohort digest(32), count u16, count x (slot u16, upload's
                                       SHA-256(32)), by ascending slot
    5 endorsement    member → relay    slot u16, signature(64)
    6 certificate    coordinator → all acceptance digest(32), count u16, count x (slot u16,
                                       signature(64)), by ascending slot
    7 release        member → relay    slot u16, seed(32), n - 1 u16, (n - 1) x share(33), by
                                       ascending slot of the member whose secret it is: of its seed
                                       where that member is accepted, else of its mask key. There is
                                       no room for both.
    8 cohort         coordinator → all groups u16 above 1, then as 2: one with a sum for each group

Signed statements, with Ed25519: `fedloom v1 mask keys\\0` and an advertisement without its
signature; `fedloom v1 accepted\\0` and the acceptance's digest. Digests, SHA-256: of a cohort over
`fedloom v1 cohort\\0` and it without signatures; of an acceptance over the whole of it. commitment
= SHA-256(`fedloom v1 seed\\0` seed). Members stand in ascending order of their ids as bytes; a
member's slot is its place in that order.
"""

import hashlib
import struct
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import InvalidContext, MalformedMessage
from ..groups import draw
from .identity import SIGNATURE_SIZE
from .shamir import SHARE_SIZE

BOX_SIZE = 2 * SHARE_SIZE + 16  # two shares and the tag of ChaCha20-Poly1305
DIGEST_SIZE = 32
KEY_SIZE = 32
MOST_MEMBERS = (1 << 16) - 1

START = struct.Struct("<4sBB16sIH")
MAGIC, VERSION = b"FDLC", 1


@dataclass(frozen=True, order=True)
class AttemptId:
    """One attempt to sum one round of one run."""

    run_id: bytes  # 16 bytes
    round: int  # u32
    attempt: int  # u16

    def __post_init__(self) -> None:
        if len(self.run_id) != 16:
            raise InvalidContext("length of run_id", "16 bytes", f"{len(self.run_id)} bytes")
        if not (0 <= self.round < 1 << 32 and 0 <= self.attempt < 1 << 16):
            raise InvalidContext("round and attempt", "u32 and u16", (self.round, self.attempt))


@dataclass(frozen=True)
class Advertisement:
    """An agent's two public keys for one attempt, and what its self mask will be made of."""

    attempt: AttemptId
    agent_id: str  # 1 .. 255 bytes of UTF-8
    mask_key: bytes  # X25519, 32 bytes
    share_key: bytes  # X25519, 32 bytes
    commitment: bytes  # to the seed of the self mask, 32 bytes
    signature: bytes  # 64 bytes

    def statement(self) -> bytes:
        """Return what the agent signs."""
        return b"fedloom v1 mask keys\0" + self.encode()[:-SIGNATURE_SIZE]

    def encode(self) -> bytes:
        """Write the message."""
        return _start(1, self.attempt) + self.entry()

    def entry(self) -> bytes:
        """Write what a cohort repeats of it."""
        name = self.agent_id.encode()
        if not 1 <= len(name) <= 255:
            raise InvalidContext("length of an agent id", "1 .. 255 bytes", len(name))
        keys = self.mask_key + self.share_key + self.commitment
        return bytes([len(name)]) + name + keys + self.signature


@dataclass(frozen=True)
class Cohort:
    """Who masks with whom in one attempt. Its order is checked here, signatures by `member`."""

    attempt: AttemptId
    minimum: int  # fewest updates that the coordinator will sum, u16
    members: tuple[Advertisement, ...]  # by ascending agent id
    groups: int = 1  # sums that the updates go into, u16

    def __post_init__(self) -> None:
        names = [member.agent_id.encode() for member in self.members]
        if names != sorted(set(names)) or not 1 <= len(names) <= MOST_MEMBERS:
            raise MalformedMessage("members", "1 .. 65535 different ones, ascending", "others")
        if any(member.attempt != self.attempt for member in self.members):
            raise MalformedMessage("members' attempt", "the cohort's", "another")
        if not 1 <= self.groups <= len(names):
            raise MalformedMessage("groups", f"1 .. {len(names)}", self.groups)

    @cached_property
    def digest(self) -> bytes:
        """Name this cohort: `UpdateContext.cohort`."""
        bare = replace(self, members=tuple(replace(m, signature=b"") for m in self.members))
        return hashlib.sha256(b"fedloom v1 cohort\0" + bare.encode()).digest()

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group of each slot."""
        return draw(self.digest, len(self.members), self.groups)

    def slot(self, agent_id: str) -> int | None:
        """Return a member's place, or None for who is none."""
        places = (i for i, member in enumerate(self.members) if member.agent_id == agent_id)
        return next(places, None)

    def encode(self) -> bytes:
        """Write the message."""
        counts = struct.pack("<HH", self.minimum, len(self.members))
        start = _start(2, self.attempt)
        if self.groups > 1:
            start = _start(8, self.attempt) + struct.pack("<H", self.groups)
        return start + counts + b"".join(m.entry() for m in self.members)


@dataclass(frozen=True)
class Boxes:
    """Sealed shares: one box from, or to, each other member."""

    attempt: AttemptId
    slot: int
    boxes: tuple[bytes, ...]  # 82 bytes each, by ascending slot of the other member

    def encode(self) -> bytes:
        """Write the message."""
        counts = struct.pack("<HH", self.slot, len(self.boxes))
        return _start(3, self.attempt) + counts + b"".join(self.boxes)


@dataclass(frozen=True)
class Acceptance:
    """The exact list of updates that one sum is of."""

    attempt: AttemptId
    cohort: bytes  # digest, 32 bytes
    uploads: tuple[tuple[int, bytes], ...]  # (slot, SHA-256 of the upload), by ascending slot

    def __post_init__(self) -> None:
        slots = [slot for slot, _ in self.uploads]
        if slots != sorted(set(slots)):
            raise MalformedMessage("accepted slots", "different ones, ascending", "others")

    @property
    def slots(self) -> tuple[int, ...]:
        """The accepted members, ascending."""
        return tuple(slot for slot, _ in self.uploads)

    @cached_property
    def digest(self) -> bytes:
        """Name this list: what members vouch for."""
        return hashlib.sha256(self.encode()).digest()

    def statement(self) -> bytes:
        """Return what a member signs to vouch for this list."""
        return b"fedloom v1 accepted\0" + self.digest

    def encode(self) -> bytes:
        """Write the message."""
        rows = (struct.pack("<H32s", slot, sha256) for slot, sha256 in self.uploads)
        count = struct.pack("<H", len(self.uploads))
        return _start(4, self.attempt) + self.cohort + count + b"".join(rows)


@dataclass(frozen=True)
class Endorsement:
    """A member vouches for the one accepted list that it has seen in this attempt."""

    attempt: AttemptId
    slot: int
    signature: bytes  # 64 bytes

    def encode(self) -> bytes:
        """Write the message."""
        return _start(5, self.attempt) + struct.pack("<H64s", self.slot, self.signature)


@dataclass(frozen=True)
class Certificate:
    """Enough members vouch for one accepted list."""

    attempt: AttemptId
    acceptance: bytes  # digest, 32 bytes
    endorsements: tuple[tuple[int, bytes], ...]  # (slot, signature), by ascending slot

    def __post_init__(self) -> None:
        slots = [slot for slot, _ in self.endorsements]
        if slots != sorted(set(slots)):
            raise MalformedMessage("vouching slots", "different ones, ascending", "others")

    def encode(self) -> bytes:
        """Write the message."""
        rows = (struct.pack("<H64s", slot, signature) for slot, signature in self.endorsements)
        count = struct.pack("<H", len(self.endorsements))
        return _start(6, self.attempt) + self.acceptance + count + b"".join(rows)


@dataclass(frozen=True)
class Release:
    """What a member gives up, once in a round: its seed, and one share of each other's secret."""

    attempt: AttemptId
    slot: int
    seed: bytes  # 32 bytes
    shares: tuple[bytes, ...]  # 33 bytes each, by ascending slot of the other member

    def __repr__(self) -> str:
        return f"Release(slot={self.slot}, <secrets>)"

    def encode(self) -> bytes:
        """Write the message."""
        counts = struct.pack("<H32sH", self.slot, self.seed, len(self.shares))
        return _start(7, self.attempt) + counts + b"".join(self.shares)


Message = Advertisement | Cohort | Boxes | Acceptance | Endorsement | Certificate | Release


def _start(kind: int, attempt: AttemptId) -> bytes:
    return START.pack(MAGIC, VERSION, kind, attempt.run_id, attempt.round, attempt.attempt)
