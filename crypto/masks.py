"""Masks modulo 2^T over packed coefficients and tags: what they hide, only the whole sum shows.

Double masking of Bonawitz et al. (CCS 2017, eprint 2017/281, §4): member i adds its self mask, and
for each neighbour j the mask of the pair, the lower slot with +, the higher with -; in a sum
of all members the pairs cancel. Device half (`masked`): add all of them. Coordinator half
(`Correction`): subtract from the sum what is left in it, which are the self masks of the accepted
members and the pairs between one accepted and one vanished member.

A mask is the keystream of AES-256-CTR under its key, as little-endian u64 words, added modulo 2^64
and then reduced modulo 2^T (2^T divides 2^64). Chunk c starts at the counter block
c(u64, big-endian) || 0(u64), and the 2^17 words of a chunk use 2^16 blocks: chunks never overlap.

A key must mask one update only, ever: whoever sees two under the same masks sees their difference.
`cohort` derives fresh keys for each attempt, and binds a member to one upload in it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from .codec import Chunks, Words
from .errors import InvalidContext

MASK_KEY_SIZE = 32

_BLOCK = 1 << 14  # words: 128 KiB of stream stays in the cache
_ZEROS = memoryview(bytes(8 * _BLOCK))


@dataclass(frozen=True, slots=True, repr=False)
class Mask:
    """One mask as it is in a member's upload, or left in a sum."""

    key: bytes  # 32 bytes, AES-256
    sign: int = 1  # 1: was added, -1: was subtracted

    def __post_init__(self) -> None:
        if len(self.key) != MASK_KEY_SIZE or self.sign not in (1, -1):
            raise InvalidContext("mask", "32 bytes and a sign of 1 or -1", "another")

    def __repr__(self) -> str:
        return "Mask(<secret>)"


def masked(chunks: Chunks, masks: Iterable[Mask], plain_bits: int) -> Chunks:
    """Device half: add all masks modulo 2^T, in place."""
    kept = tuple(masks)
    modulus = np.uint64((1 << plain_bits) - 1)
    for chunk, coefficients in chunks:
        _add(coefficients, kept, chunk)
        coefficients &= modulus
        yield chunk, coefficients


@dataclass(frozen=True)
class Correction:
    """Coordinator half: the masks that are left in a sum."""

    masks: tuple[Mask, ...]
    groups: tuple[int, ...] = ()  # in whose sum each is left (`groups`); empty: there is one sum

    def of(self, group: int) -> "Correction":
        """Return what is left in one group's sum."""
        pairs = zip(self.masks, self.groups, strict=True)
        return Correction(tuple(mask for mask, found in pairs if found == group))

    def words(self, chunk: int, count: int, plain_bits: int) -> Words:
        """Return what added to the sum modulo 2^T removes them: (count,) u64 below 2^T."""
        removed = np.zeros(count, np.uint64)
        _add(removed, tuple(Mask(mask.key, -mask.sign) for mask in self.masks), chunk)
        removed &= np.uint64((1 << plain_bits) - 1)
        return removed


def _add(words: Words, masks: tuple[Mask, ...], chunk: int) -> None:
    """Add or subtract each mask's stream modulo 2^64, block by block, so that it stays cached."""
    streams = [(np.add if mask.sign > 0 else np.subtract, _stream(mask, chunk)) for mask in masks]
    buffer = bytearray(8 * _BLOCK + 15)  # update_into may write a partial cipher block more
    drawn = np.frombuffer(buffer, "<u8", _BLOCK)
    for block in _blocks(words):
        size = 8 * len(block)
        for combine, stream in streams:
            stream.update_into(_ZEROS[:size], buffer)
            combine(block, drawn[: len(block)], out=block)


def _stream(mask: Mask, chunk: int) -> CipherContext:
    start = chunk.to_bytes(8, "big") + bytes(8)
    return Cipher(algorithms.AES(mask.key), modes.CTR(start)).encryptor()


def _blocks(words: Words) -> Iterator[Words]:
    for start in range(0, len(words), _BLOCK):
        yield words[start : start + _BLOCK]
