"""Protection `masked`: masks and tags without encryption, for devices that have no TenSEAL.

Device half: pack → tag → mask → frame. Coordinator half: add modulo 2^T, then take out the masks
left in the sum. Opening half: unframe → verify → unpack, on the device; the coordinator may read
the sum as well (`read_sum`), without being able to verify it: it has no run key.

    update chunk and sum chunk   header(52)  planes(7 x 4096·n)

A word is the coefficient itself, below 2^T, in the place of the 56 high bits that `wire` writes.
The keys, the coefficients and the sums are those of `sealed`, bit for bit; only the cipher is
missing. So the coordinator learns the sum, and with c members the sum of the others.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .chunks import packed, unpacked
from .codec import Chunks, Words, check_update
from .crew import count_processes, stepped
from .errors import MalformedChunk
from .masks import Correction, Mask, masked
from .members import SummedMembers, check_members, require_masks
from .parameters import DROPPED_BITS, RING_DEGREE, BfvParameters, UpdateContext
from .protection import OpenedSum
from .run_key import RunKey
from .tags import Tagger
from .wire import (
    HEADER_SIZE,
    PLANE_BYTES,
    Binding,
    Kind,
    Source,
    check_headers,
    check_size,
    fill,
    planes_of,
    words_of,
)

_PLANES = PLANE_BYTES * RING_DEGREE
_SHIFT = np.uint64(DROPPED_BITS)  # `wire` drops these bits of 60: coefficients use the others


def encoder(
    context: UpdateContext,
    member: int,
    run_key: RunKey | None,
    rng: np.random.Generator,
    masks: Sequence[Mask] | None = None,
    processes: int = 1,
) -> "MaskedEncoder":
    """Make the encoder of one member; `rng` only rounds, the run key only makes tags.

    `masks` are those that `cohort.member` gives for this attempt. See `sealed.encoder`.
    """
    return MaskedEncoder(context, member, run_key, rng, require_masks(masks), processes)


def accumulator(context: UpdateContext, processes: int = 1) -> "MaskedTotal":
    """Make an empty total; its `result` takes the correction."""
    del processes
    return MaskedTotal(context)


def open_sum(
    context: UpdateContext,
    run_key: RunKey | None,
    members: Sequence[int],
    source: Source,
    processes: int = 1,
) -> OpenedSum:
    """Read the sum of exactly these members' updates.

    Raises TagMismatch where it is another sum, or masks are left in it.
    """
    del processes
    parameters = BfvParameters.derive(context, "masked")
    tagger = Tagger(parameters, run_key)
    chunks = tagger.verified(_unframed(parameters, members, source), members)
    return unpacked(parameters, chunks, len(members))


def read_sum(context: UpdateContext, members: Sequence[int], source: Source) -> OpenedSum:
    """Read a sum without the run key, as the coordinator does: nothing proves whose it is."""
    parameters = BfvParameters.derive(context, "masked")
    return unpacked(parameters, _unframed(parameters, members, source), len(members))


class MaskedEncoder:
    """See `protection.Encoder`."""

    def __init__(
        self,
        context: UpdateContext,
        member: int,
        run_key: RunKey | None,
        rng: np.random.Generator,
        masks: tuple[Mask, ...],
        processes: int,
    ) -> None:
        self._parameters = BfvParameters.derive(context, "masked")
        self._binding = Binding.of(context, Kind.MASKED_UPDATE, member, self._parameters.id)
        self._member = member
        self._tagger = Tagger(self._parameters, run_key)
        self._rng = rng
        self._masks = masks
        self._processes = count_processes(processes, self._parameters.value_chunks)

    @property
    def encoded_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, _PLANES)

    def encode(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        check_update(update, weight, self._parameters.context)
        chunks = packed(self._parameters, update, weight, self._rng)
        chunks = self._tagger.tagged(chunks, self._member)
        step = partial(_hidden, self._parameters.plain_bits, self._binding, self._masks)
        return stepped(step, chunks, self._processes)


class MaskedTotal:
    """See `protection.Accumulator`. Memory: 8 bytes per coefficient, 4 per parameter at v = 2."""

    def __init__(self, context: UpdateContext) -> None:
        self._parameters = BfvParameters.derive(context, "masked")
        self._modulus = np.uint64((1 << self._parameters.plain_bits) - 1)
        counters = self._parameters.chunk_ciphertexts(self._parameters.value_chunks)
        self._total = np.zeros(  # (coefficients,) u64, chunk after chunk, modulo 2^64
            self._parameters.coefficients + counters * RING_DEGREE, np.uint64
        )
        self._members = SummedMembers(context)

    @property
    def encoded_sum_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, _PLANES)

    @property
    def encoded_update_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, _PLANES)

    @property
    def members(self) -> tuple[int, ...]:
        return self._members.ascending()

    def add(self, member: int, source: Source) -> None:
        parameters = self._parameters
        binding = Binding.of(parameters.context, Kind.MASKED_UPDATE, member, parameters.id)
        self._members.check_admissible(member)
        check_size(source, self.encoded_update_size)
        check_headers(source, binding, parameters, _PLANES)
        for chunk in parameters.update_order:  # a word too large is the one other thing to refuse
            _read(source, parameters, chunk)
        with self._members.adding(member):
            source.seek(0)
            for chunk in parameters.update_order:
                self._total[self._span(chunk)] += _read(source, parameters, chunk)

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        self._members.check_summed(correction, masked=True)
        return self._frames(correction or Correction(()))

    def _frames(self, correction: Correction) -> Iterator[bytes]:
        parameters = self._parameters
        binding = Binding.of(parameters.context, Kind.MASKED_SUM, len(self._members), parameters.id)
        for chunk in parameters.sum_order:
            total = self._total[self._span(chunk)]
            summed = total + correction.words(chunk, len(total), parameters.plain_bits)
            summed &= self._modulus
            yield _framed(binding, chunk, summed)

    def _span(self, chunk: int) -> slice:
        parameters = self._parameters
        if chunk < parameters.value_chunks:
            return parameters.span(chunk)
        return slice(parameters.coefficients, len(self._total))  # the counters lie at the end


def _hidden(
    plain_bits: int, binding: Binding, masks: tuple[Mask, ...], chunks: Chunks
) -> Iterator[bytes]:
    """Mask and frame: what a worker does."""
    for chunk, words in masked(chunks, masks, plain_bits):
        yield _framed(binding, chunk, words)


def _framed(binding: Binding, chunk: int, words: Words) -> bytes:
    n = len(words) // RING_DEGREE
    frame = bytearray(HEADER_SIZE + n * _PLANES)
    frame[:HEADER_SIZE] = binding.header(chunk, n)
    planes_of(words << _SHIFT, memoryview(frame)[HEADER_SIZE:], slice(0, len(words)), len(words))
    return bytes(frame)


def _unframed(parameters: BfvParameters, members: Sequence[int], source: Source) -> Chunks:
    check_members(tuple(members), parameters.context)
    binding = Binding.of(parameters.context, Kind.MASKED_SUM, len(members), parameters.id)
    check_size(source, parameters.encoded_size(HEADER_SIZE, _PLANES))
    check_headers(source, binding, parameters, _PLANES)
    return ((chunk, _read(source, parameters, chunk)) for chunk in parameters.sum_order)


def _read(source: Source, parameters: BfvParameters, chunk: int) -> Words:
    """Read the next chunk's words; raises MalformedChunk for one that is not below 2^T."""
    n = parameters.chunk_ciphertexts(chunk)
    frame = memoryview(bytearray(HEADER_SIZE + n * _PLANES))
    fill(source, frame)
    size = n * RING_DEGREE
    words = words_of(frame[HEADER_SIZE:], slice(0, size), size) >> _SHIFT
    largest = int(words.max())
    if largest >> parameters.plain_bits:
        raise MalformedChunk("words", f"less than 2^{parameters.plain_bits}", largest)
    return words
