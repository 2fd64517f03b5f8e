"""The steps that need SEAL: encrypt and frame, add, unframe and decrypt.

    update chunk   header(52)  n x seed(64)  c0 planes(7 x 4096·n)
    sum chunk      header(52)  c0 planes(7 x 4096·n)  c1 planes(7 x 4096·n)  c1 nibbles(4096·n / 2)

with n the number of ciphertexts, and the order of words that of the coefficients. Protections
`encrypted` and `sealed` are made of these steps; they differ in what lies between `chunks.packed`
and here. The coordinator's half is the same, but for the correction that takes the masks out.
"""

from collections.abc import Iterator

import numpy as np

from .bfv import SEED_SIZE, Ciphertext, KeyedRing, Ring
from .codec import Chunks, Words
from .errors import MissingKey
from .masks import Correction
from .members import SummedMembers
from .parameters import CHUNK_CIPHERTEXTS, RING_DEGREE, BfvParameters
from .run_key import RunKey, ternary_secret
from .wire import (
    HEADER_SIZE,
    PLANE_BYTES,
    Binding,
    Kind,
    Source,
    add_nibbles,
    centred,
    check_headers,
    check_residues,
    check_size,
    fill,
    nibbles_of,
    planes_of,
    words_of,
)

_PLANES = PLANE_BYTES * RING_DEGREE  # bytes of one polynomial's high bits
UPDATE_CIPHERTEXT = SEED_SIZE + _PLANES
SUM_CIPHERTEXT = 2 * _PLANES + RING_DEGREE // 2


def keyed_ring(parameters: BfvParameters, run_key: RunKey | None) -> KeyedRing:
    """Make the ring of who holds the run key."""
    if run_key is None:
        raise MissingKey(f"run key of protection {parameters.protection}", "one", "none")
    return KeyedRing(parameters.plain_bits, ternary_secret(run_key, parameters.context.run_id))


def encrypted(ring: KeyedRing, binding: Binding, chunks: Chunks) -> Iterator[bytes]:
    """Device half: encrypt and frame each chunk of an update."""
    for chunk, coefficients in chunks:
        n = len(coefficients) // RING_DEGREE
        frame = bytearray(HEADER_SIZE + n * UPDATE_CIPHERTEXT)
        frame[:HEADER_SIZE] = binding.header(chunk, n)
        planes = memoryview(frame)[HEADER_SIZE + n * SEED_SIZE :]
        for i in range(n):
            c0, seed = ring.encrypt(coefficients[_one(i)])
            frame[HEADER_SIZE + i * SEED_SIZE : HEADER_SIZE + (i + 1) * SEED_SIZE] = seed
            planes_of(c0, planes, _one(i), n * RING_DEGREE)
        yield bytes(frame)


def decrypted(
    parameters: BfvParameters, ring: KeyedRing, binding: Binding, source: Source
) -> Chunks:
    """Opening half: read a sum, refuse what is no ciphertext, and decrypt the rest."""
    check_size(source, parameters.encoded_size(HEADER_SIZE, SUM_CIPHERTEXT))
    for chunk in parameters.sum_order:
        n = parameters.chunk_ciphertexts(chunk)
        frame = memoryview(bytearray(HEADER_SIZE + n * SUM_CIPHERTEXT))
        fill(source, frame)
        binding.check(frame[:HEADER_SIZE], chunk, n)
        coefficients = np.empty(n * RING_DEGREE, np.uint64)
        for i in range(n):
            c0, c1 = _residues(frame[HEADER_SIZE:], i, n)
            coefficients[_one(i)] = ring.decrypt(ring.ciphertext(c0, c1))
        yield chunk, coefficients


class CiphertextTotal:
    """See `protection.Accumulator`. Memory: 16 bytes per coefficient, 8 per parameter at v = 2."""

    def __init__(self, parameters: BfvParameters, update_kind: Kind, sum_kind: Kind) -> None:
        self._parameters = parameters
        self._update_kind, self._sum_kind = update_kind, sum_kind
        self._ring = Ring(parameters.plain_bits)
        self._totals: dict[tuple[int, int], Ciphertext] = {}  # by chunk and place in it
        self._members = SummedMembers(parameters.context)

    @property
    def encoded_sum_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, SUM_CIPHERTEXT)

    @property
    def encoded_update_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, UPDATE_CIPHERTEXT)

    @property
    def members(self) -> tuple[int, ...]:
        return self._members.ascending()

    def add(self, member: int, source: Source) -> None:
        parameters = self._parameters
        binding = Binding.of(parameters.context, self._update_kind, member, parameters.id)
        self._members.check_admissible(member)
        # Lengths and headers are all there is to check: any seed and any 56-bit word is valid.
        check_size(source, self.encoded_update_size)
        check_headers(source, binding, parameters, UPDATE_CIPHERTEXT)
        with self._members.adding(member):
            source.seek(0)
            frame = memoryview(bytearray(HEADER_SIZE + CHUNK_CIPHERTEXTS * UPDATE_CIPHERTEXT))
            for chunk in parameters.update_order:
                self._add_chunk(source, chunk, frame)

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        self._members.check_summed(correction, masked=self._sum_kind is Kind.SEALED_SUM)
        return self._frame(correction)

    def _add_chunk(self, source: Source, chunk: int, buffer: memoryview) -> None:
        n = self._parameters.chunk_ciphertexts(chunk)
        frame = buffer[: HEADER_SIZE + n * UPDATE_CIPHERTEXT]
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

    def _frame(self, correction: Correction | None) -> Iterator[bytes]:
        parameters = self._parameters
        binding = Binding.of(parameters.context, self._sum_kind, len(self._members), parameters.id)
        for chunk in parameters.sum_order:
            n = parameters.chunk_ciphertexts(chunk)
            frame = bytearray(HEADER_SIZE + n * SUM_CIPHERTEXT)
            frame[:HEADER_SIZE] = binding.header(chunk, n)
            body = memoryview(frame)[HEADER_SIZE:]
            removed = None
            if correction is not None:
                removed = correction.words(chunk, n * RING_DEGREE, parameters.plain_bits)
            for i in range(n):
                total = self._totals[chunk, i]
                if removed is not None:
                    total = self._ring.plus(total, removed[_one(i)])
                c0, c1 = self._ring.residues(total)
                planes_of(c0, body, _one(i), n * RING_DEGREE)
                planes_of(c1, body[n * _PLANES :], _one(i), n * RING_DEGREE)
                nibbles_of(c1, body[2 * n * _PLANES :], _one(i))
            yield bytes(frame)


def _residues(body: memoryview, i: int, n: int) -> tuple[Words, Words]:
    """Read ciphertext i of the n in a chunk of a sum: c0 and c1, (4096,) u64 below q each."""
    c0 = words_of(body, _one(i), n * RING_DEGREE)
    c1 = words_of(body[n * _PLANES :], _one(i), n * RING_DEGREE)
    add_nibbles(c1, body[2 * n * _PLANES :], _one(i))
    check_residues(c0, "c0")
    check_residues(c1, "c1")
    return centred(c0), c1


def _one(i: int) -> slice:
    """Place of ciphertext i among the coefficients of its chunk."""
    return slice(i * RING_DEGREE, (i + 1) * RING_DEGREE)
