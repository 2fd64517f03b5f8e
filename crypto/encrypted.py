"""Protection `encrypted`: exact sums of BFV ciphertexts; the coordinator reads nothing.

Device half: pack (codec) → encrypt (bfv) → frame (wire). Each step is an iterator over
(chunk, coefficients), values first and the counters last, since the saturated values are known
only then. Coordinator half: add. Opening half: unframe → decrypt → unpack, counters first: they
hold the total weight, and they refuse a wrong key before any work is done.

Protection `sealed` puts its steps between pack and encrypt (tag, then mask) and between decrypt
and unpack (unmask, then verify); the coordinator half is the same.

    update chunk   header(52)  n x seed(64)  c0 planes(7 x 4096·n)
    sum chunk      header(52)  c0 planes(7 x 4096·n)  c1 planes(7 x 4096·n)  c1 nibbles(4096·n / 2)

with n the number of ciphertexts, and the order of words that of the coefficients. The chunk of
index `value_chunks` carries the counters: 0 updates (1 each), 1 weight, 2 saturated values, 3-15
zero, from 16 on two tags per chunk of values (zero here), then zero. It is the last chunk of an
update and the first of a sum.

Who holds the run key opens any update that it sees: the coordinator and one agent together read
everything. That is what `sealed` is for.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .bfv import SEED_SIZE, Ciphertext, KeyedRing, Ring
from .codec import check_update, pack, unpack
from .errors import MissingKey, OpeningFailed
from .members import SummedMembers, check_members
from .parameters import (
    CHUNK_CIPHERTEXTS,
    COUNTER_SATURATED,
    COUNTER_SUMMANDS,
    COUNTER_WEIGHT,
    RING_DEGREE,
    BfvParameters,
    UpdateContext,
)
from .protection import OpenedSum
from .run_key import RunKey, ternary_secret
from .wire import (
    HEADER_SIZE,
    PLANE_BYTES,
    Binding,
    Kind,
    Source,
    add_nibbles,
    centred,
    check_residues,
    check_size,
    fill,
    nibbles_of,
    planes_of,
    words_of,
)

_PLANES = PLANE_BYTES * RING_DEGREE  # bytes of one polynomial's high bits
_UPDATE_CIPHERTEXT = SEED_SIZE + _PLANES
_SUM_CIPHERTEXT = 2 * _PLANES + RING_DEGREE // 2

Words = NDArray[np.uint64]
Chunks = Iterator[tuple[int, Words]]  # (chunk, (4096·n,) u64 coefficients below t)


def encoder(
    context: UpdateContext, member: int, run_key: RunKey | None, rng: np.random.Generator
) -> "EncryptedEncoder":
    """Make the encoder of one member; `rng` only rounds."""
    return EncryptedEncoder(context, member, run_key, rng)


def accumulator(context: UpdateContext) -> "EncryptedAccumulator":
    """Make an empty total."""
    return EncryptedAccumulator(context)


def open_sum(
    context: UpdateContext, run_key: RunKey | None, members: Sequence[int], source: Source
) -> OpenedSum:
    """Open the sum of these members' updates.

    Raises OpeningFailed where it decrypts to what they cannot have sent together. That catches a
    wrong key, a wrong number of updates and blind tampering, not a coordinator that adds or leaves
    out whole updates and says so consistently: that takes the tags of `sealed`.
    """
    check_members(tuple(members), context)
    parameters = BfvParameters.derive(context)
    binding = Binding.of(context, Kind.ENCRYPTED_SUM, len(members), parameters.id)
    ring = _keyed_ring(parameters, run_key)
    chunks = _decrypt(parameters, ring, binding, source)
    total_weight, saturated = _open_counters(parameters, next(chunks)[1], len(members))
    mean = np.empty(context.parameter_count, np.float32)
    for chunk, summed in chunks:
        span = _span(parameters, chunk)
        unpack(parameters, summed, span, len(members), total_weight, mean)
    return OpenedSum(mean, total_weight, saturated, len(members))


class EncryptedEncoder:
    """See `protection.Encoder`."""

    def __init__(
        self,
        context: UpdateContext,
        member: int,
        run_key: RunKey | None,
        rng: np.random.Generator,
    ) -> None:
        self._parameters = BfvParameters.derive(context)
        self._binding = Binding.of(context, Kind.ENCRYPTED_UPDATE, member, self._parameters.id)
        self._ring = _keyed_ring(self._parameters, run_key)
        self._rng = rng

    @property
    def encoded_size(self) -> int:
        return _encoded_size(self._parameters, _UPDATE_CIPHERTEXT)

    def encode(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        check_update(update, weight, self._parameters.context)
        return self._encrypt(self._pack(update, weight))

    def _pack(self, update: NDArray[np.float32], weight: int) -> Chunks:
        parameters, saturated = self._parameters, 0
        for chunk in range(parameters.value_chunks):
            span = _span(parameters, chunk)
            packed, clipped = pack(parameters, update, weight, span, self._rng)
            saturated += clipped
            yield chunk, packed
        last = parameters.value_chunks
        counters = np.zeros(parameters.chunk_ciphertexts(last) * RING_DEGREE, np.uint64)
        counters[COUNTER_SUMMANDS] = 1
        counters[COUNTER_WEIGHT] = weight
        counters[COUNTER_SATURATED] = saturated
        yield last, counters

    def _encrypt(self, chunks: Chunks) -> Iterator[bytes]:
        for chunk, coefficients in chunks:
            n = len(coefficients) // RING_DEGREE
            frame = bytearray(HEADER_SIZE + n * _UPDATE_CIPHERTEXT)
            frame[:HEADER_SIZE] = self._binding.header(chunk, n)
            planes = memoryview(frame)[HEADER_SIZE + n * SEED_SIZE :]
            for i in range(n):
                c0, seed = self._ring.encrypt(coefficients[_one(i)])
                frame[HEADER_SIZE + i * SEED_SIZE : HEADER_SIZE + (i + 1) * SEED_SIZE] = seed
                planes_of(c0, planes, _one(i), n * RING_DEGREE)
            yield bytes(frame)


class EncryptedAccumulator:
    """See `protection.Accumulator`. Memory: 16 bytes per coefficient, 8 per parameter at v = 2."""

    def __init__(self, context: UpdateContext) -> None:
        self._parameters = BfvParameters.derive(context)
        self._ring = Ring(self._parameters.plain_bits)
        self._totals: dict[tuple[int, int], Ciphertext] = {}  # by chunk and place in it
        self._members = SummedMembers(context)

    @property
    def encoded_sum_size(self) -> int:
        return _encoded_size(self._parameters, _SUM_CIPHERTEXT)

    @property
    def encoded_update_size(self) -> int:
        return _encoded_size(self._parameters, _UPDATE_CIPHERTEXT)

    @property
    def members(self) -> tuple[int, ...]:
        return self._members.ascending()

    def add(self, member: int, source: Source) -> None:
        context = self._parameters.context
        binding = Binding.of(context, Kind.ENCRYPTED_UPDATE, member, self._parameters.id)
        self._members.check_admissible(member)
        self._validate(source, binding)
        with self._members.adding(member):
            source.seek(0)
            frame = memoryview(bytearray(HEADER_SIZE + CHUNK_CIPHERTEXTS * _UPDATE_CIPHERTEXT))
            for chunk in _update_order(self._parameters):
                self._add_chunk(source, chunk, frame)

    def result(self) -> Iterator[bytes]:
        self._members.check_summed()
        return self._frame()

    def _validate(self, source: Source, binding: Binding) -> None:
        """Check the length and every header: any seed and any 56-bit word is a valid one."""
        check_size(source, self.encoded_update_size)
        header, offset = memoryview(bytearray(HEADER_SIZE)), 0
        for chunk in _update_order(self._parameters):
            n = self._parameters.chunk_ciphertexts(chunk)
            source.seek(offset)
            fill(source, header)
            binding.check(header, chunk, n)
            offset += HEADER_SIZE + n * _UPDATE_CIPHERTEXT

    def _add_chunk(self, source: Source, chunk: int, buffer: memoryview) -> None:
        n = self._parameters.chunk_ciphertexts(chunk)
        frame = buffer[: HEADER_SIZE + n * _UPDATE_CIPHERTEXT]
        fill(source, frame)
        planes = frame[HEADER_SIZE + n * SEED_SIZE :]
        for i in range(n):
            seed = bytes(frame[HEADER_SIZE + i * SEED_SIZE : HEADER_SIZE + (i + 1) * SEED_SIZE])
            c0 = centred(words_of(planes, _one(i), n * RING_DEGREE))
            summand = self._ring.seeded(c0, seed)
            if (chunk, i) in self._totals:
                self._ring.add(self._totals[chunk, i], summand)
            else:
                self._totals[chunk, i] = summand

    def _frame(self) -> Iterator[bytes]:
        context = self._parameters.context
        binding = Binding.of(context, Kind.ENCRYPTED_SUM, len(self._members), self._parameters.id)
        for chunk in _sum_order(self._parameters):
            n = self._parameters.chunk_ciphertexts(chunk)
            frame = bytearray(HEADER_SIZE + n * _SUM_CIPHERTEXT)
            frame[:HEADER_SIZE] = binding.header(chunk, n)
            body = memoryview(frame)[HEADER_SIZE:]
            for i in range(n):
                c0, c1 = self._ring.residues(self._totals[chunk, i])
                planes_of(c0, body, _one(i), n * RING_DEGREE)
                planes_of(c1, body[n * _PLANES :], _one(i), n * RING_DEGREE)
                nibbles_of(c1, body[2 * n * _PLANES :], _one(i))
            yield bytes(frame)


def _decrypt(
    parameters: BfvParameters, ring: KeyedRing, binding: Binding, source: Source
) -> Chunks:
    """Read a sum chunk by chunk, refuse what is no ciphertext, and decrypt the rest."""
    check_size(source, _encoded_size(parameters, _SUM_CIPHERTEXT))
    for chunk in _sum_order(parameters):
        n = parameters.chunk_ciphertexts(chunk)
        frame = memoryview(bytearray(HEADER_SIZE + n * _SUM_CIPHERTEXT))
        fill(source, frame)
        binding.check(frame[:HEADER_SIZE], chunk, n)
        coefficients = np.empty(n * RING_DEGREE, np.uint64)
        for i in range(n):
            c0, c1 = _residues(frame[HEADER_SIZE:], i, n)
            coefficients[_one(i)] = ring.decrypt(ring.ciphertext(c0, c1))
        yield chunk, coefficients


def _residues(body: memoryview, i: int, n: int) -> tuple[Words, Words]:
    """Read ciphertext i of the n in a chunk of a sum: c0 and c1, (4096,) u64 below q each."""
    c0 = words_of(body, _one(i), n * RING_DEGREE)
    c1 = words_of(body[n * _PLANES :], _one(i), n * RING_DEGREE)
    add_nibbles(c1, body[2 * n * _PLANES :], _one(i))
    check_residues(c0, "c0")
    check_residues(c1, "c1")
    return centred(c0), c1


def _open_counters(parameters: BfvParameters, counters: Words, count: int) -> tuple[int, int]:
    """Return the total weight and the saturated values of a sum of `count` updates."""
    context = parameters.context
    weight, saturated = int(counters[COUNTER_WEIGHT]), int(counters[COUNTER_SATURATED])
    possible = (
        int(counters[COUNTER_SUMMANDS]) == count
        and count <= weight <= count * context.weight_cap
        and saturated <= count * context.parameter_count
        and not counters[COUNTER_SATURATED + 1 :].any()
    )
    if not possible:
        raise OpeningFailed("counters", f"those of a sum of {count} updates", "others")
    return weight, saturated


def _keyed_ring(parameters: BfvParameters, run_key: RunKey | None) -> KeyedRing:
    if run_key is None:
        raise MissingKey("run key of protection encrypted", "one", "none")
    return KeyedRing(parameters.plain_bits, ternary_secret(run_key, parameters.context.run_id))


def _span(parameters: BfvParameters, chunk: int) -> slice:
    start = chunk * CHUNK_CIPHERTEXTS * RING_DEGREE
    return slice(start, start + parameters.chunk_ciphertexts(chunk) * RING_DEGREE)


def _one(i: int) -> slice:
    """Place of ciphertext i among the coefficients of its chunk."""
    return slice(i * RING_DEGREE, (i + 1) * RING_DEGREE)


def _update_order(parameters: BfvParameters) -> Iterable[int]:
    return range(parameters.value_chunks + 1)


def _sum_order(parameters: BfvParameters) -> Iterable[int]:
    return (parameters.value_chunks, *range(parameters.value_chunks))


def _encoded_size(parameters: BfvParameters, per_ciphertext: int) -> int:
    ciphertexts = parameters.ciphertexts + parameters.chunk_ciphertexts(parameters.value_chunks)
    return (parameters.value_chunks + 1) * HEADER_SIZE + ciphertexts * per_ciphertext
