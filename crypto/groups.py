"""Several sums in one round: who is in which group, a total for each, and what is opened of them.

An upload is added to the sum of its member's group and to no other, so that whatever a member
sends changes the mean of its own group alone; a rule across the groups' means then leaves some of
them out (Velicheti and Koyejo, arXiv:2110.02940, SHARE, where groups are clusters). Sending G
blocks in one update, all but one of them zeros, would not do: under masks nobody sees who writes
into another's block.

    groups   the members in ascending order of SHA-256(`fedloom v1 groups\\0` seed, slot u16) are
             dealt to the groups in turn: the i-th is in group i mod G. With masks the seed is the
             cohort's digest; else whoever adds draws it, and states the groups
    sums     n x group u16, by ascending slot of the n summed members; then G sums, each as its
             protection encodes it. Little-endian

Sizes of groups differ by one at most. Each sum has at least MINIMUM_GROUP updates, or is none.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from .errors import EmptyTotal, MalformedChunk
from .masks import Correction
from .protection import Accumulator, OpenedSum
from .wire import Source, fill

MINIMUM_GROUP = 3  # updates: in a sum of two each would know the other's

Combine = Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]]


def draw(seed: bytes, members: int, groups: int) -> tuple[int, ...]:
    """Return the group of each slot, (members,) of 0 .. groups - 1."""

    def key(slot: int) -> bytes:
        return hashlib.sha256(b"fedloom v1 groups\0" + seed + struct.pack("<H", slot)).digest()

    group_of = [0] * members
    for place, slot in enumerate(sorted(range(members), key=key) if groups > 1 else ()):
        group_of[slot] = place % groups
    return tuple(group_of)


class GroupedTotal:
    """A total for each group; see `protection.Accumulator`. Memory: G times that of one."""

    def __init__(self, group_of: Sequence[int], new_total: Callable[[], Accumulator]) -> None:
        self._group_of = tuple(group_of)
        self._totals = [new_total() for _ in range(max(group_of) + 1)]

    @property
    def encoded_sum_size(self) -> int:
        sums = sum(total.encoded_sum_size for total in self._totals)
        return 2 * len(self.members) + sums

    @property
    def encoded_update_size(self) -> int:
        return self._totals[0].encoded_update_size

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(chain.from_iterable(total.members for total in self._totals)))

    def add(self, member: int, source: Source) -> None:
        self._totals[self._group_of[member]].add(member, source)

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        for group, total in enumerate(self._totals):
            if len(total.members) < MINIMUM_GROUP:
                found = len(total.members)
                raise EmptyTotal(f"updates of group {group}", f"at least {MINIMUM_GROUP}", found)
        header = np.array([self._group_of[member] for member in self.members], "<u2").tobytes()
        sums = [
            total.result(None if correction is None else correction.of(group))
            for group, total in enumerate(self._totals)
        ]
        return chain([header], *sums)


def open_sums(
    members: Sequence[int],
    groups: int,
    source: Source,
    open_one: Callable[[Sequence[int], Source], OpenedSum],
    combine: Combine,
    tail_length: int = 0,
) -> OpenedSum:
    """Open the groups' sums and return them as one, whose mean is what `combine` makes of theirs.

    `combine` gets the groups' means without their tails; the tail is the weighted mean over all,
    as in one sum. The histogram is that of the group which is in the middle by its largest
    exponent: a group with a member that overstates its own does not set the next clip.
    """
    opened = [open_one(*part) for part in _parts(members, groups, source)]
    weight = sum(one.total_weight for one in opened)
    values = len(opened[0].mean) - tail_length
    mean = np.empty(len(opened[0].mean), np.float32)
    mean[:values] = combine([one.mean[:values] for one in opened])
    tail = np.zeros(tail_length, np.float64)
    for one in opened:
        tail += one.mean[values:].astype(np.float64) * (one.total_weight / weight)
    mean[values:] = tail
    return OpenedSum(
        mean,
        weight,
        sum(one.saturated for one in opened),
        sum(one.count for one in opened),
        _middle([one.exponents for one in opened]),
    )


def _middle(histograms: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the histogram of the lower middle by the largest exponent that occurs."""

    def largest(histogram: tuple[int, ...]) -> int:
        return max((place for place, count in enumerate(histogram) if count), default=-1)

    return sorted(histograms, key=largest)[(len(histograms) - 1) // 2]


def _parts(
    members: Sequence[int], groups: int, source: Source
) -> Iterator[tuple[tuple[int, ...], "_Part"]]:
    """Yield each group's members and its sum."""
    header = memoryview(bytearray(2 * len(members)))
    size = source.seek(0, os.SEEK_END) - len(header)
    if size < 0 or size % groups:
        raise MalformedChunk("encoded size", f"{groups} sums behind their members", size)
    source.seek(0)
    fill(source, header)
    group_of = np.frombuffer(header, "<u2").tolist()
    for group in range(groups):
        own = tuple(m for m, found in zip(members, group_of, strict=True) if found == group)
        if len(own) < MINIMUM_GROUP:
            raise MalformedChunk(f"members of group {group}", f"{MINIMUM_GROUP} or more", len(own))
    if max(group_of) >= groups:
        raise MalformedChunk("groups of the members", f"less than {groups}", max(group_of))
    size //= groups
    for group in range(groups):
        own = tuple(m for m, found in zip(members, group_of, strict=True) if found == group)
        yield own, _Part(source, len(header) + group * size, size)


class _Part:
    """A `wire.Source` of a part of another; one at a time."""

    def __init__(self, whole: Source, start: int, size: int) -> None:
        self._whole, self._start, self._size = whole, start, size
        self._place = 0
        self.seek(0)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence, self._size)
        self._whole.seek(self._start + self._place)
        return self._place

    def readinto(self, buffer: memoryview, /) -> int | None:
        count = self._whole.readinto(buffer[: max(0, self._size - self._place)])
        self._place += count or 0
        return count
