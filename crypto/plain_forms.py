"""How protection `plain` writes an update's values after header and weight: all, few, or coarse.

P values, of which the last M are the tail (`UpdateContext`), n = P - M; the context says which:

    all        P x f32
    listed     k x u32 places, strictly ascending, below n;  k x f32, their values;  M x f32
    quantised  ⌈n/512⌉ x f32 scales, at least 0;  n x i8 levels, -127 .. 127;  M x f32

Of `listed`, values at other places are 0; of `quantised`, value i is scale_(i/512)·level_i/127. So
an upload's length follows from the context in every form, and a total needs no more memory for one
than for another: sums have all values. Rounding is that of QSGD (Alistarh et al., arXiv 1610.02132,
§3.1 with s = 127, in blocks, each scaled by its largest value, not its norm): with z = 127·x/scale,

    level = ⌊z⌋ + (u < z - ⌊z⌋),   u uniform in [0, 1),   E[level] = z.

A reader checks every place, scale, level and value in each pass, before it uses them.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .codec import Update, check_finite
from .errors import InvalidUpdate, MalformedChunk
from .parameters import UpdateContext
from .wire import HEADER_SIZE, Source, fill

BODY = HEADER_SIZE + 8  # offset of the first value: after the weight
GROUP = 512  # values that share a scale
LEVELS = 127  # on each side of 0

_BLOCK = 1 << 15  # values handled at once, a multiple of GROUP
Values = NDArray[np.float32] | NDArray[np.float64]
Spot = slice | NDArray[np.uint32]


class Form(Protocol):
    """One way to write an update's values."""

    @property
    def size(self) -> int:
        """Bytes of the values."""

    def check(self, update: Update) -> None:
        """Refuse with InvalidUpdate what cannot be written so; (P,) finite values."""

    def written(self, update: Update, rng: np.random.Generator) -> Iterator[bytes]:
        """Write (P,) values, block by block."""

    def read(self, source: Source) -> Iterator[tuple[Spot, Values]]:
        """Read an upload of the right length: where values are, ascending, and what they are.

        Raises MalformedChunk or NotFinite, after which nothing that was read may be kept.
        """


def form_of(context: UpdateContext) -> Form:
    """Return the form of a context's updates."""
    if context.listed:
        return _Listed(context)
    return _Quantised(context) if context.quantised else _All(context)


class _All:
    def __init__(self, context: UpdateContext) -> None:
        self._count = context.parameter_count
        self.size = 4 * self._count

    def check(self, update: Update) -> None:
        pass

    def written(self, update: Update, rng: np.random.Generator) -> Iterator[bytes]:
        del rng
        return _floats(update)

    def read(self, source: Source) -> Iterator[tuple[Spot, Values]]:
        return _read_floats(source, BODY, 0, self._count)


class _Listed:
    def __init__(self, context: UpdateContext) -> None:
        self._count = context.parameter_count
        self._limit = context.parameter_count - context.tail_length
        self._listed = context.listed
        self._values_at = BODY + 4 * self._listed
        self._tail_at = self._values_at + 4 * self._listed
        self.size = 8 * self._listed + 4 * context.tail_length

    def check(self, update: Update) -> None:
        found = int(np.count_nonzero(update[: self._limit]))
        if found > self._listed:
            raise InvalidUpdate("values other than 0", f"at most {self._listed}", found)

    def written(self, update: Update, rng: np.random.Generator) -> Iterator[bytes]:
        del rng
        places = self._places(update[: self._limit])
        for start in range(0, self._listed, _BLOCK):
            yield places[start : start + _BLOCK].astype("<u4", copy=False).tobytes()
        for start in range(0, self._listed, _BLOCK):
            yield from _floats(update[places[start : start + _BLOCK]])
        yield from _floats(update[self._limit :])

    def _places(self, values: Update) -> NDArray[np.uint32]:
        """Return the places of what is not 0, and of the first zeros where these are too few."""
        places = np.flatnonzero(values).astype(np.uint32)
        if missing := self._listed - len(places):
            zeros = np.flatnonzero(values[: self._listed] == 0)[:missing]
            places = np.union1d(places, zeros.astype(np.uint32))
        return places

    def read(self, source: Source) -> Iterator[tuple[Spot, Values]]:
        least = 0
        for start in range(0, self._listed, _BLOCK):
            count = min(_BLOCK, self._listed - start)
            places = np.frombuffer(_bytes(source, BODY + 4 * start, 4 * count), "<u4")
            self._check_places(places, least)
            least = int(places[-1]) + 1
            values = np.frombuffer(_bytes(source, self._values_at + 4 * start, 4 * count), "<f4")
            check_finite(values, start)
            yield places, values
        yield from _read_floats(source, self._tail_at, self._limit, self._count)

    def _check_places(self, places: NDArray[np.uint32], least: int) -> None:
        ascending = bool((places[1:] > places[:-1]).all())
        if not (ascending and least <= places[0] and places[-1] < self._limit):
            raise MalformedChunk(
                "places of values", f"strictly ascending, below {self._limit}", "others"
            )


class _Quantised:
    def __init__(self, context: UpdateContext) -> None:
        self._count = context.parameter_count
        self._limit = context.parameter_count - context.tail_length
        self._levels_at = BODY + 4 * -(-self._limit // GROUP)
        self._tail_at = self._levels_at + self._limit
        self.size = self._tail_at - BODY + 4 * context.tail_length

    def check(self, update: Update) -> None:
        pass

    def written(self, update: Update, rng: np.random.Generator) -> Iterator[bytes]:
        values = update[: self._limit]
        for block in self._blocks():
            yield _scales(values[block]).astype("<f4", copy=False).tobytes()
        for block in self._blocks():
            yield _levels(values[block], rng).tobytes()
        yield from _floats(update[self._limit :])

    def read(self, source: Source) -> Iterator[tuple[Spot, Values]]:
        for block in self._blocks():
            size = block.stop - block.start
            first, count = block.start // GROUP, -(-size // GROUP)
            scales = np.frombuffer(_bytes(source, BODY + 4 * first, 4 * count), "<f4")
            check_finite(scales, first)
            if scales.min() < 0:
                raise MalformedChunk("scales of levels", "at least 0", "less")
            levels = np.frombuffer(_bytes(source, self._levels_at + block.start, size), "i1")
            if levels.min() < -LEVELS:
                raise MalformedChunk("levels", f"-{LEVELS} .. {LEVELS}", int(levels.min()))
            yield block, _spread(scales, size) * levels / LEVELS
        yield from _read_floats(source, self._tail_at, self._limit, self._count)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self._limit, _BLOCK):
            yield slice(start, min(start + _BLOCK, self._limit))


def _scales(values: Update) -> NDArray[np.float32]:
    """Return the largest magnitude in each group."""
    starts = np.arange(0, len(values), GROUP)
    largest: NDArray[np.float32] = np.maximum.reduceat(np.abs(values), starts)
    return largest


def _spread(scales: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Return the scale of each of `size` values."""
    return np.repeat(scales.astype(np.float64), GROUP)[:size]


def _levels(values: Update, rng: np.random.Generator) -> NDArray[np.int8]:
    scales = _spread(_scales(values), len(values))
    scales[scales == 0] = 1
    z = values * np.float64(LEVELS) / scales  # within ±127: the largest value is the scale itself
    floor = np.floor(z)
    floor += rng.random(len(z)) < z - floor
    return floor.astype(np.int8)


def _floats(values: Update) -> Iterator[bytes]:
    for start in range(0, len(values), _BLOCK):
        yield values[start : start + _BLOCK].astype("<f4", copy=False).tobytes()


def _read_floats(
    source: Source, offset: int, first: int, last: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Read the values from place `first` to `last`, which begin at `offset`, into one buffer."""
    source.seek(offset)
    buffer = memoryview(bytearray(4 * min(_BLOCK, last - first)))
    for start in range(first, last, _BLOCK):
        stop = min(start + _BLOCK, last)
        part = buffer[: 4 * (stop - start)]
        fill(source, part)
        values = np.frombuffer(part, "<f4")
        check_finite(values, start)
        yield slice(start, stop), values


def _bytes(source: Source, offset: int, size: int) -> memoryview:
    source.seek(offset)
    part = memoryview(bytearray(size))
    fill(source, part)
    return part
