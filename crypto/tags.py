"""Two keyed linear tags per chunk: the opened sum is that of exactly the accepted updates.

A one-time linearly homomorphic MAC: the polynomial-free case of Carter and Wegman (JCSS 22(3),
1981, §3), an inner product with a secret vector masked by a one-time pad; sums of tags are tags of
sums (Agrawal and Boneh, ACNS 2009, §3, for one round and coefficients 1). Over GF(p), p = 2^31 - 1,
for k = 0, 1 and a chunk with coefficients m_0, m_1, … (integers, before any mask):

    tag_k = Σ_l r_(k,l)·m_l + ρ_(k,i)   (mod p)

r is the same for all members of an attempt, ρ is the member's own, and both are pseudo-random
under the tag key, which follows from the run key. The sum M of the members in A, which is one of
integers (`parameters`), satisfies Σ tag_k = Σ_l r_(k,l)·M_l + Σ_(i in A) ρ_(k,i). Who does not
know the tag key and changes M, A, or both, satisfies it with a probability below 2^-60 (two tags;
r is uniform up to one residue in 2^31). The counters have tags of their own, as the last chunk.

    key of r      HMAC-SHA256(tag key, `fedloom v1 tag vector\\0` binding chunk(u32) k(u8))
    r             the keystream of AES-256-CTR with that key from counter 0, as u32 words, each
                  without its highest bit
    ρ             HMAC-SHA256(tag key, `fedloom v1 tag pad\\0` binding chunk(u32) k(u8)
                  member(u16)), the first 8 bytes as u64, mod p
    binding       parameters id(16) run id(16) round(u32) attempt(u16)

Little-endian. The parameters id contains protection and cohort. The chunk of counters is tagged
over its first 16 coefficients.

Tags hold against the coordinator, not against a member: who has the run key can make them. What a
lying member can do is spoil a sum, or send any update within the clip, as in every aggregation.
"""

import hmac
import struct
from collections.abc import Sequence
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .codec import Chunks, Words
from .errors import (
    InvalidContext,
    MemberSwapped,
    MissingKey,
    TagMismatch,
    UpdateCountedTwice,
    UpdateLeftOut,
)
from .parameters import COUNTERS, TAGS_PER_CHUNK, BfvParameters
from .run_key import RunKey

PRIME = (1 << 31) - 1

_LOW_BITS = 26  # coefficients have at most 52 bits: halves of 26 times 31 bits leave 7 bits free
_LANE = 64  # summands of 57 bits that fit into 63
_BLOCK = 1 << 14  # coefficients handled at once: two blocks of r and two products in the cache


class Tagger:
    """Makes and verifies the tags of one attempt."""

    def __init__(self, parameters: BfvParameters, run_key: RunKey | None) -> None:
        if run_key is None:
            raise MissingKey(f"run key of protection {parameters.protection}", "one", "none")
        context = parameters.context
        if context.capacity * (PRIME - 1) >> parameters.plain_bits:
            raise InvalidContext("capacity of a sum with tags", "at most 2219", context.capacity)
        self._counters = parameters.value_chunks
        self._capacity = context.capacity
        self._key = run_key.derive("tag key", context.run_id)
        self._binding = struct.pack(
            "<16s16sIH", parameters.id, context.run_id, context.round, context.attempt
        )

    def tagged(self, chunks: Chunks, member: int) -> Chunks:
        """Device half: pass the values on, and the counters with all tags in their places."""
        tags: list[int] = []
        for chunk, coefficients in chunks:
            sums = self._sums(chunk, coefficients)
            pads = self._pads(chunk, member)
            tags += [(a + b) % PRIME for a, b in zip(sums, pads, strict=True)]
            if chunk == self._counters:
                coefficients[COUNTERS : COUNTERS + len(tags)] = tags
            yield chunk, coefficients

    def verified(self, chunks: Chunks, members: Sequence[int]) -> Chunks:
        """Opening half: pass on what is the sum of exactly these members' updates.

        The counters come first. Raises TagMismatch or the kind of it that explains the tags.
        """
        first, counters = next(chunks)
        tags = counters[COUNTERS : COUNTERS + TAGS_PER_CHUNK * (self._counters + 1)].tolist()
        self._verify(first, counters, tags, members)
        yield first, counters
        for chunk, coefficients in chunks:
            self._verify(chunk, coefficients, tags, members)
            yield chunk, coefficients

    def _verify(
        self, chunk: int, coefficients: Words, tags: list[int], members: Sequence[int]
    ) -> None:
        found = tags[TAGS_PER_CHUNK * chunk : TAGS_PER_CHUNK * (chunk + 1)]
        pads = [self._pads(chunk, member) for member in members]
        expected = [sum(column) for column in zip(*pads, strict=True)]
        sums = self._sums(chunk, coefficients)
        excess = tuple((f - s - e) % PRIME for f, s, e in zip(found, sums, expected, strict=True))
        if any(excess):
            self._explain(chunk, excess, members)

    def _explain(self, chunk: int, excess: tuple[int, ...], members: Sequence[int]) -> None:
        """Say which whole update is missing or too many, if that is all that is wrong."""
        pads = {m: self._pads(chunk, m) for m in range(self._capacity)} | {
            m: self._pads(chunk, m) for m in members
        }
        by_pads = {pad: member for member, pad in pads.items()}
        if (twice := by_pads.get(excess)) in members:
            raise UpdateCountedTwice("sum", "each accepted update once", f"slot {twice} twice")
        for member in members:
            rest = tuple((x + p) % PRIME for x, p in zip(excess, pads[member], strict=True))
            if not any(rest):
                raise UpdateLeftOut("sum", f"the update of slot {member} in it", "none")
            if (other := by_pads.get(rest)) is not None:
                raise MemberSwapped("sum", f"the update of slot {member}", f"that of {other}")
        raise TagMismatch(f"tags of chunk {chunk}", "those of the accepted updates", "others")

    def _sums(self, chunk: int, coefficients: Words) -> tuple[int, ...]:
        tagged = coefficients[:COUNTERS] if chunk == self._counters else coefficients
        keys = [self._derive(b"vector", chunk, k) for k in range(TAGS_PER_CHUNK)]
        streams = [Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor() for key in keys]
        totals = [0] * TAGS_PER_CHUNK
        zeros = bytes(4 * _BLOCK)
        for start in range(0, len(tagged), _BLOCK):
            block = tagged[start : start + _BLOCK]
            low, high = block & np.uint64((1 << _LOW_BITS) - 1), block >> np.uint64(_LOW_BITS)
            for k, stream in enumerate(streams):
                drawn = np.frombuffer(stream.update(zeros[: 4 * len(block)]), "<u4")
                factors = (drawn & np.uint32(PRIME)).astype(np.uint64)
                totals[k] += _inner(low, factors) + (_inner(high, factors) << _LOW_BITS)
        return tuple(total % PRIME for total in totals)

    def _pads(self, chunk: int, member: int) -> tuple[int, ...]:
        suffix = struct.pack("<H", member)
        derived = [self._derive(b"pad", chunk, k, suffix) for k in range(TAGS_PER_CHUNK)]
        return tuple(int.from_bytes(pad[:8], "little") % PRIME for pad in derived)

    def _derive(self, purpose: bytes, chunk: int, k: int, suffix: bytes = b"") -> bytes:
        label = b"fedloom v1 tag " + purpose + b"\0"
        message = label + self._binding + struct.pack("<IB", chunk, k) + suffix
        return hmac.digest(self._key, message, "sha256")


def _inner(coefficients: Words, factors: Words) -> int:
    """Return Σ coefficients·factors, an integer congruent to it modulo p below 2^63."""
    whole = len(coefficients) // _LANE * _LANE
    rows = partial(np.reshape, shape=(-1, _LANE))
    lanes = np.einsum("ij,ij->i", rows(coefficients[:whole]), rows(factors[:whole]))
    rest = int((coefficients[whole:] * factors[whole:]).sum())
    return int((lanes % np.uint64(PRIME)).sum()) + rest
