"""Protection `plain`: float32 values as they are; the coordinator reads every update.

    update   header(52)  weight u64        values          one member's, as `plain_forms` says
    sum      header(52)  total weight u64  P x float32     the weighted mean

The mean is that of FedAvg (McMahan et al., arXiv 1602.05629v4, algorithm 1). All numbers are
little-endian; the header is that of `wire` with 0 ciphertexts and chunk 0.

The total is Σ w·x in float64. Its last bit depends on the order of the additions, so two
coordinators that add in different orders may publish means that differ by one unit in the last
place of float32. (`encrypted` adds integers: there the order never shows.)
"""

import struct
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .codec import check_finite, check_update, check_weight
from .errors import MalformedChunk, MissingKey, NotFinite
from .masks import Correction, Mask
from .members import SummedMembers, check_members, refuse_masks
from .parameters import PlainParameters, UpdateContext
from .plain_forms import BODY, Form, form_of
from .protection import OpenedSum
from .run_key import RunKey
from .wire import HEADER_SIZE, Binding, Kind, Source, check_size, fill

_WEIGHT = struct.Struct("<Q")
_BLOCK = 1 << 15  # values: 128 KiB of float32 and 256 KiB of float64 stay in the cache


def encoder(
    context: UpdateContext,
    member: int,
    run_key: RunKey | None,
    rng: np.random.Generator,
    masks: Sequence[Mask] | None = None,
    processes: int = 1,
) -> "PlainEncoder":
    """Make the encoder of one member. It takes no key and no masks; `rng` rounds to levels."""
    del processes
    refuse_masks(masks)
    _refuse_key(run_key)
    return PlainEncoder(context, member, rng)


def accumulator(context: UpdateContext, processes: int = 1) -> "PlainAccumulator":
    """Make an empty total."""
    del processes
    return PlainAccumulator(context)


def open_sum(
    context: UpdateContext,
    run_key: RunKey | None,
    members: Sequence[int],
    source: Source,
    processes: int = 1,
) -> OpenedSum:
    """Read the mean of these members' updates, as the coordinator says it is."""
    del processes
    _refuse_key(run_key)
    check_members(tuple(members), context)
    binding = Binding.of(context, Kind.PLAIN_SUM, len(members), PlainParameters(context).id)
    check_size(source, encoded_size(context))
    total_weight = _read_prefix(source, binding)
    low, high = len(members), len(members) * context.weight_cap
    if not low <= total_weight <= high:
        raise MalformedChunk("total weight", f"{low} .. {high}", total_weight)
    mean = np.empty(context.parameter_count, np.float32)
    for start, block in _blocks(source, context):
        _check_mean(block, start)
        mean[start : start + len(block)] = block
    return OpenedSum(mean, total_weight, saturated=0, count=len(members))


def encoded_sum(
    context: UpdateContext, count: int, total_weight: int, mean: NDArray[np.float32]
) -> Iterator[bytes]:
    """Encode a sum that another protection opened as `open_sum` here reads it.

    The same sum gives the same bytes on every device: it holds no more than the mean, (P,) float32,
    the total weight and the count of the updates. The mean must not change meanwhile.
    """
    yield sum_prefix(context, count, total_weight)
    for start in range(0, len(mean), _BLOCK):
        yield mean[start : start + _BLOCK].astype("<f4", copy=False).tobytes()


class PlainEncoder:
    """See `protection.Encoder`."""

    def __init__(self, context: UpdateContext, member: int, rng: np.random.Generator) -> None:
        self._context = context
        self._form = form_of(context)
        self._rng = rng
        self._binding = Binding.of(context, Kind.PLAIN_UPDATE, member, PlainParameters(context).id)

    @property
    def encoded_size(self) -> int:
        return BODY + self._form.size

    def encode(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        check_update(update, weight, self._context)
        self._form.check(update)
        return self._chunks(update, weight)

    def _chunks(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        yield self._binding.header(0, 0) + _WEIGHT.pack(weight)
        yield from self._form.written(update, self._rng)


class Roll:
    """Updates that are checked and not added: whose they are and what they weigh."""

    def __init__(self, context: UpdateContext) -> None:
        self._context = context
        self._form = form_of(context)
        self._parameters_id = PlainParameters(context).id
        self._members = SummedMembers(context)
        self.weights: dict[int, int] = {}  # by slot

    @property
    def members(self) -> tuple[int, ...]:
        """The slots of the updates, in ascending order."""
        return self._members.ascending()

    def add(self, member: int, source: Source) -> None:
        """Check a member's whole update and note its weight, or raise and change nothing."""
        self._members.check_admissible(member)
        weight = _checked_weight(self._context, self._form, self._parameters_id, member, source)
        with self._members.adding(member):
            self.weights[member] = weight

    def check_summed(self, correction: Correction | None) -> None:
        """Refuse to make a sum of nothing, or to take masks out where there are none."""
        self._members.check_summed(correction, masked=False)


def read_values(source: Source, start: int, values: NDArray[np.float32]) -> None:
    """Fill (n,) float32 from the place `start` on of a checked update that has all its values."""
    source.seek(BODY + 4 * start)
    fill(source, values.data.cast("B"))
    if sys.byteorder == "big":
        values.byteswap(inplace=True)


class PlainAccumulator:
    """See `protection.Accumulator`. Memory: 8 bytes per parameter."""

    def __init__(self, context: UpdateContext) -> None:
        self._context = context
        self._form = form_of(context)
        self._parameters_id = PlainParameters(context).id
        self._total = np.zeros(context.parameter_count, np.float64)  # (P,), Σ w·x
        self._total_weight = 0
        self._members = SummedMembers(context)

    @property
    def encoded_sum_size(self) -> int:
        return encoded_size(self._context)

    @property
    def encoded_update_size(self) -> int:
        return BODY + self._form.size

    @property
    def members(self) -> tuple[int, ...]:
        return self._members.ascending()

    def add(self, member: int, source: Source) -> None:
        self._members.check_admissible(member)
        weight = _checked_weight(self._context, self._form, self._parameters_id, member, source)
        with self._members.adding(member):
            self._add_values(source, weight)
            self._total_weight += weight

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        self._members.check_summed(correction, masked=False)
        return self._chunks()

    def _chunks(self) -> Iterator[bytes]:
        yield sum_prefix(self._context, len(self._members), self._total_weight)
        mean = np.empty(min(_BLOCK, len(self._total)), "<f4")
        for start in range(0, len(self._total), _BLOCK):
            block = self._total[start : start + _BLOCK]
            out = mean[: len(block)]
            np.divide(block, np.float64(self._total_weight), out=out, casting="same_kind")
            yield out.tobytes()

    def _add_values(self, source: Source, weight: int) -> None:
        weighted = np.empty(min(_BLOCK, len(self._total)), np.float64)
        for places, block in self._form.read(source):
            out = weighted[: len(block)]
            np.multiply(block, np.float64(weight), out=out, dtype=np.float64)
            self._total[places] += out  # no place twice: they ascend


def encoded_size(context: UpdateContext) -> int:
    """Return the bytes of a sum, and of an update that has all its values."""
    return BODY + 4 * context.parameter_count


def _checked_weight(
    context: UpdateContext, form: Form, parameters_id: bytes, member: int, source: Source
) -> int:
    """Check a whole update of this member; return its weight."""
    binding = Binding.of(context, Kind.PLAIN_UPDATE, member, parameters_id)
    check_size(source, BODY + form.size)
    weight = _read_prefix(source, binding)
    check_weight(weight, context)
    for _ in form.read(source):
        pass  # each pass checks what it reads
    return weight


def sum_prefix(context: UpdateContext, count: int, total_weight: int) -> bytes:
    """Return what stands before the mean in the encoded sum of so many updates."""
    binding = Binding.of(context, Kind.PLAIN_SUM, count, PlainParameters(context).id)
    return binding.header(0, 0) + _WEIGHT.pack(total_weight)


def _read_prefix(source: Source, binding: Binding) -> int:
    """Check the header and return the weight after it."""
    prefix = memoryview(bytearray(BODY))
    fill(source, prefix)
    binding.check(prefix[:HEADER_SIZE], 0, 0)
    (weight,) = _WEIGHT.unpack(prefix[HEADER_SIZE:])
    return int(weight)


def _blocks(source: Source, context: UpdateContext) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Read the values block by block into one buffer: (start, (n,) float32)."""
    count = context.parameter_count
    buffer = memoryview(bytearray(4 * min(_BLOCK, count)))
    for start in range(0, count, _BLOCK):
        part = buffer[: 4 * min(_BLOCK, count - start)]
        fill(source, part)
        yield start, np.frombuffer(part, "<f4")


def _check_mean(block: NDArray[np.float32], start: int) -> None:
    try:
        check_finite(block, start)
    except NotFinite as error:
        raise MalformedChunk("mean", "finite values", "NaN or infinity") from error


def _refuse_key(run_key: RunKey | None) -> None:
    if run_key is not None:
        raise MissingKey("run key of protection plain", "none", "one")
