"""The steps that need SEAL: encrypt and frame, add, unframe and decrypt.

    update chunk   header(52)  n x seed(64)  c0 planes(7 x 4096·n)
    sum chunk      header(52)  c0 planes(7 x 4096·n)  c1 planes(7 x 4096·n)  c1 nibbles(4096·n / 2)

with n the number of ciphertexts, and the order of words that of the coefficients. Protections
`encrypted` and `sealed` are made of these steps; they differ in what lies between `chunks.packed`
and here. The coordinator's half is the same, but for the correction that takes the masks out.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from .bfv import SEED_SIZE, Ciphertext, KeyedRing, Ring
from .codec import Chunks, Words
from .crew import Crew, count_processes, crew_of, stepped
from .errors import MissingKey
from .masks import Correction
from .members import SummedMembers
from .parameters import RING_DEGREE, BfvParameters
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

Bodies = Iterator[tuple[int, bytearray]]  # (chunk, what follows the header in its frame)


def encrypted(
    parameters: BfvParameters, run_key: RunKey | None, binding: Binding, chunks: Chunks
) -> Iterator[bytes]:
    """Device half: encrypt and frame each chunk of an update."""
    ring = _keyed_ring(parameters, run_key)
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
    parameters: BfvParameters,
    run_key: RunKey | None,
    binding: Binding,
    source: Source,
    processes: int,
) -> Generator[tuple[int, Words], None, None]:
    """Opening half: read a sum, refuse what is no ciphertext, and decrypt the rest."""
    check_size(source, parameters.encoded_size(HEADER_SIZE, SUM_CIPHERTEXT))
    bodies = _bodies(source, binding, parameters, parameters.sum_order, SUM_CIPHERTEXT)
    count = count_processes(processes, parameters.value_chunks)
    return stepped(partial(_decrypted, parameters, run_key), bodies, count)


def _decrypted(parameters: BfvParameters, run_key: RunKey | None, bodies: Bodies) -> Chunks:
    ring = _keyed_ring(parameters, run_key)
    for chunk, body in bodies:
        n = len(body) // SUM_CIPHERTEXT
        coefficients = np.empty(n * RING_DEGREE, np.uint64)
        for i in range(n):
            c0, c1 = _residues(memoryview(body), i, n)
            coefficients[_one(i)] = ring.decrypt(ring.ciphertext(c0, c1))
        yield chunk, coefficients


@dataclass(frozen=True)
class _Question:
    """What is a chunk of the sum, without the masks that are left in it?"""

    header: bytes
    correction: Correction | None


class CiphertextTotal:
    """See `protection.Accumulator`. Memory: 16 bytes per coefficient, 8 per parameter at v = 2."""

    def __init__(
        self, parameters: BfvParameters, update_kind: Kind, sum_kind: Kind, processes: int
    ) -> None:
        self._parameters = parameters
        self._update_kind, self._sum_kind = update_kind, sum_kind
        self._processes = count_processes(processes, parameters.value_chunks)
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
            order = parameters.update_order
            bodies = _bodies(source, binding, parameters, order, UPDATE_CIPHERTEXT)
            for _ in self._crew.run(bodies):
                pass

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        self._members.check_summed(correction, masked=self._sum_kind is Kind.SEALED_SUM)
        return self._crew.run(self._questions(correction))

    @cached_property  # made by the first addition: to start workers takes time
    def _crew(self) -> Crew[tuple[int, bytearray | _Question], bytes]:
        return crew_of(partial(_totalled, self._parameters.plain_bits), self._processes)

    def _questions(self, correction: Correction | None) -> Iterator[tuple[int, _Question]]:
        parameters = self._parameters
        binding = Binding.of(parameters.context, self._sum_kind, len(self._members), parameters.id)
        for chunk in parameters.sum_order:
            header = binding.header(chunk, parameters.chunk_ciphertexts(chunk))
            yield chunk, _Question(header, correction)


def _totalled(
    plain_bits: int, chunks: Iterator[tuple[int, bytearray | _Question]]
) -> Iterator[bytes]:
    """Add the bodies of updates to totals, and answer questions for these."""
    ring = Ring(plain_bits)
    totals: dict[int, list[Ciphertext]] = {}  # by chunk
    for chunk, given in chunks:
        if isinstance(given, _Question):
            yield _framed(ring, totals[chunk], chunk, given)
        else:
            _add(ring, totals.setdefault(chunk, []), given)
            yield b""


def _add(ring: Ring, totals: list[Ciphertext], body: bytearray) -> None:
    n = len(body) // UPDATE_CIPHERTEXT
    planes = memoryview(body)[n * SEED_SIZE :]
    for i in range(n):
        seed = bytes(body[i * SEED_SIZE : (i + 1) * SEED_SIZE])
        summand = ring.seeded(centred(words_of(planes, _one(i), n * RING_DEGREE)), seed)
        if i < len(totals):
            ring.add(totals[i], summand)
        else:
            totals.append(summand)


def _framed(ring: Ring, totals: list[Ciphertext], chunk: int, question: _Question) -> bytes:
    n = len(totals)
    frame = bytearray(HEADER_SIZE + n * SUM_CIPHERTEXT)
    frame[:HEADER_SIZE] = question.header
    body = memoryview(frame)[HEADER_SIZE:]
    removed = None
    if question.correction is not None:
        removed = question.correction.words(chunk, n * RING_DEGREE, ring.plain_bits)
    for i, total in enumerate(totals):
        summed = total if removed is None else ring.plus(total, removed[_one(i)])
        c0, c1 = ring.residues(summed)
        planes_of(c0, body, _one(i), n * RING_DEGREE)
        planes_of(c1, body[n * _PLANES :], _one(i), n * RING_DEGREE)
        nibbles_of(c1, body[2 * n * _PLANES :], _one(i))
    return bytes(frame)


def _bodies(
    source: Source,
    binding: Binding,
    parameters: BfvParameters,
    order: Iterable[int],
    per_ciphertext: int,
) -> Bodies:
    """Read the chunks of a file in this order; a body is valid until the next one is asked for."""
    header, body = memoryview(bytearray(HEADER_SIZE)), bytearray()
    for chunk in order:
        n = parameters.chunk_ciphertexts(chunk)
        fill(source, header)
        binding.check(header, chunk, n)
        if len(body) != n * per_ciphertext:
            body = bytearray(n * per_ciphertext)
        fill(source, memoryview(body))
        yield chunk, body


def _keyed_ring(parameters: BfvParameters, run_key: RunKey | None) -> KeyedRing:
    if run_key is None:
        raise MissingKey(f"run key of protection {parameters.protection}", "one", "none")
    return KeyedRing(parameters.plain_bits, ternary_secret(run_key, parameters.context.run_id))


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
