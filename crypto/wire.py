"""Chunks as bytes: one header for every kind, planes of 7-byte words, refusal of everything else.

Every length is implied by the context that the receiver holds, so nothing that a peer writes is
ever used as a size, and nothing is allocated for a peer before its lengths have been compared.

Header, 52 bytes, little-endian:

    offset  size  content
    0       4     `FDLM`
    4       1     format version, 1
    5       1     kind: 1 plain update, 2 plain sum, 3 encrypted update, 4 encrypted sum,
                    5 masked update, 6 masked sum, 7 sealed update, 8 sealed sum
    6       2     an update: the member's slot in the cohort; a sum: how many updates are in it
    8       4     round
    12      2     attempt
    14      2     number of ciphertexts in this chunk (plain: 0; masked: 4096 words each)
    16      4     index of this chunk
    20      16    parameters id
    36      16    run id

A ciphertext word has 60 bits, a residue modulo q. Its 56 high bits travel as three planes, so that
both sides are whole-array copies: bits 4-35 of all words (u32 each), bits 36-51 of all (u16 each),
bits 52-59 of all (u8 each). The four low bits of c0 do not travel (`parameters`), those of c1
do, where it travels at all: a fourth plane, word 2i in the low half of byte i, word 2i+1 in the
high half.
"""

import os
import struct
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidContext, MalformedChunk, WrongContext
from .parameters import DROPPED_BITS, MODULUS, BfvParameters, UpdateContext

MAGIC = b"FDLM"
VERSION = 1
PLANE_BYTES = 7  # per word: what `planes_of` writes

_HEADER = struct.Struct("<4sBBHIHHI16s16s")
HEADER_SIZE = _HEADER.size

Words = NDArray[np.uint64]


class Source(Protocol):
    """A seekable binary file: an open file, BytesIO, SpooledTemporaryFile."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to an offset."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read at most len(buffer) bytes."""


class Kind(IntEnum):
    """What the bytes after the header are."""

    PLAIN_UPDATE = 1
    PLAIN_SUM = 2
    ENCRYPTED_UPDATE = 3
    ENCRYPTED_SUM = 4
    MASKED_UPDATE = 5
    MASKED_SUM = 6
    SEALED_UPDATE = 7
    SEALED_SUM = 8


@dataclass(frozen=True)
class Binding:
    """What all chunks of one update or one sum have in common."""

    kind: Kind
    member_or_count: int  # u16, see the header
    round: int
    attempt: int
    parameters_id: bytes
    run_id: bytes

    @classmethod
    def of(
        cls, context: UpdateContext, kind: Kind, member_or_count: int, parameters_id: bytes
    ) -> "Binding":
        """Bind to a context."""
        if not 0 <= member_or_count < 1 << 16:
            raise InvalidContext("member", "0 .. 65535", member_or_count)
        return cls(
            kind, member_or_count, context.round, context.attempt, parameters_id, context.run_id
        )

    def header(self, chunk: int, ciphertexts: int) -> bytes:
        """Write the header of one chunk."""
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.member_or_count,
            self.round,
            self.attempt,
            ciphertexts,
            chunk,
            self.parameters_id,
            self.run_id,
        )

    def check(self, header: bytes | memoryview, chunk: int, ciphertexts: int) -> None:
        """Refuse a header that is not exactly `self.header(chunk, ciphertexts)`.

        Raises MalformedChunk where no honest peer could have written it, WrongContext (`subject`
        names the field) where one could have, for something else.
        """
        magic, version, kind, member, round_, attempt, count, index, parameters_id, run_id = (
            _HEADER.unpack(header)
        )
        if (magic, version) != (MAGIC, VERSION):
            raise MalformedChunk("magic and version", (MAGIC, VERSION), (magic, version))
        found = (kind, member, round_, attempt, parameters_id, run_id)
        names = ("kind", "member or count", "round", "attempt", "parameters id", "run id")
        for name, ours, theirs in zip(names, astuple(self), found, strict=True):
            if ours != theirs:
                raise WrongContext(name, _shown(ours), _shown(theirs))
        if (index, count) != (chunk, ciphertexts):
            raise MalformedChunk(
                "chunk index and ciphertexts", (chunk, ciphertexts), (index, count)
            )


def check_size(source: Source, expected: int) -> None:
    """Refuse a file that is not exactly as long as the context implies, and rewind it."""
    found = source.seek(0, os.SEEK_END)
    if found != expected:
        raise MalformedChunk("encoded size", f"{expected} bytes", f"{found} bytes")
    source.seek(0)


def check_headers(
    source: Source, binding: Binding, parameters: BfvParameters, per_ciphertext: int
) -> None:
    """Refuse a file in which any chunk's header is not the one that it must be, and rewind it."""
    header, offset = memoryview(bytearray(HEADER_SIZE)), 0
    order = parameters.sum_order if binding.kind % 2 == 0 else parameters.update_order
    for chunk in order:
        n = parameters.chunk_ciphertexts(chunk)
        source.seek(offset)
        fill(source, header)
        binding.check(header, chunk, n)
        offset += HEADER_SIZE + n * per_ciphertext
    source.seek(0)


def fill(source: Source, buffer: memoryview) -> None:
    """Read until the buffer is full; raises MalformedChunk where the file ends before."""
    filled = 0
    while filled < len(buffer):
        count = source.readinto(buffer[filled:])
        if not count:
            raise MalformedChunk("bytes to read", len(buffer), filled)
        filled += count


def planes_of(words: Words, planes: memoryview, span: slice, n: int) -> None:
    """Write the 56 high bits of 60-bit words to the places `span` of the planes of n words."""
    high = words.astype("<u8", copy=False) >> np.uint64(DROPPED_BITS)  # u64 < 2^56
    np.frombuffer(planes, "<u4", n)[span] = high.view("<u4")[::2]
    np.frombuffer(planes, "<u2", n, 4 * n)[span] = high.view("<u2")[2::4]
    np.frombuffer(planes, "u1", n, 6 * n)[span] = high.view("u1")[6::8]


def words_of(planes: memoryview, span: slice, n: int) -> Words:
    """Read the places `span` of the planes of n words: u64 < 2^60, the four low bits zero."""
    words = np.zeros(span.stop - span.start, "<u8")
    words.view("<u4")[::2] = np.frombuffer(planes, "<u4", n)[span]
    words.view("<u2")[2::4] = np.frombuffer(planes, "<u2", n, 4 * n)[span]
    words.view("u1")[6::8] = np.frombuffer(planes, "u1", n, 6 * n)[span]
    words <<= np.uint64(DROPPED_BITS)
    return words


def centred(words: Words) -> Words:
    """Put the middle of the dropped bits back: residues below q, off by at most 2^(d-1)."""
    residues: Words = words | np.uint64(1 << (DROPPED_BITS - 1))
    np.minimum(residues, residues - np.uint64(MODULUS), out=residues)  # the difference wraps if < q
    return residues


def nibbles_of(words: Words, nibbles: memoryview, span: slice) -> None:
    """Write the four low bits of words to the places `span` (even ends) of the nibble plane."""
    low = (words & np.uint64(15)).astype(np.uint8)
    packed = low[::2] | (low[1::2] << np.uint8(4))
    np.frombuffer(nibbles, "u1")[span.start // 2 : span.stop // 2] = packed


def add_nibbles(words: Words, nibbles: memoryview, span: slice) -> None:
    """Put the four low bits of the words at `span` (even ends) back in place."""
    packed = np.frombuffer(nibbles, "u1")[span.start // 2 : span.stop // 2]
    words[::2] |= packed & np.uint8(15)
    words[1::2] |= packed >> np.uint8(4)


def check_residues(words: Words, subject: str) -> None:
    """Refuse words that are not residues modulo q."""
    largest = int(words.max(initial=0))
    if largest >= MODULUS:
        raise MalformedChunk(f"residues of {subject}", f"less than {MODULUS}", largest)


def _shown(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value
