"""What this device remembers from round to round: c_i, g_k, what waits to be sent, its own model.

It must move exactly with the sums: a change that is in a stored sum and not here, or here and in no
sum, would bend the run's objective for good. So it is proposed before the update leaves the device,
bound to the update's place, and taken over when that place is in a round's sum:

    propose   memory.proposed   written whole before the first byte of the update is uploaded
    settle    rename to memory  once the sum is open, before the state that includes it is written

A process that dies between settling and writing the state finds nothing proposed when the round is
applied again. Both files, mode 0600, hold what this device has learnt from its data. Little-endian:

    8 bytes   magic, with the format's version
    16 bytes  run
    u64       round in whose sum the change is
    u32 u32   attempt, slot in its cohort
    u32       number of vectors
    u64       P, length of a vector
    f32       the vectors
    32 bytes  SHA-256 of everything before
"""

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from fedloom.errors import Reason, Refused
from fedloom.secret_files import delete_secret, write_secret
from fedloom.strategies import Memory
from fedloom.strategies.arithmetic import Vector

_FILE, _PROPOSED = "memory", "memory.proposed"
_MAGIC = b"FDLMEMO\1"
_HEADER = struct.Struct("<8s16sQIIIQ")
_DIGEST_BYTES = 32
_log = structlog.get_logger()


@dataclass(frozen=True)
class SumPlace:
    """Where an update stands: a slot in the cohort of an attempt."""

    round: int
    attempt: int
    slot: int


class LocalMemory:
    """`count` vectors of `size` float32 in a run's folder; with a count of 0 nothing is kept.

    `own`: the last of them is the device's own model, and begins as what this returns.
    """

    def __init__(
        self,
        folder: Path,
        run_id: bytes,
        count: int,
        size: int,
        own: Callable[[], Vector] | None = None,
    ) -> None:
        self._kept = folder / _FILE
        self._proposed = folder / _PROPOSED
        self._run_id = run_id
        self._count = count
        self._size = size
        self._own = own

    def vectors(self) -> Memory:
        """Read what is remembered: how it begins before an update of this device is in a sum.

        Raises Refused(TRAINING_FAILED) for a file that is not whole: to begin with zeros would
        leave the device's earlier part in the server's vector for good.
        """
        if self._count and self._kept.exists():
            return self._read()
        sums = self._count if self._own is None else self._count - 1
        zeros = tuple(np.zeros(self._size, np.float32) for _ in range(sums))
        return zeros if self._own is None else (*zeros, self._own())

    def propose(self, place: SumPlace, vectors: Memory) -> None:
        """Keep what is to be remembered if the update at this place comes into a stored sum."""
        if not self._count:
            return
        header = _HEADER.pack(
            _MAGIC,
            self._run_id,
            place.round,
            place.attempt,
            place.slot,
            self._count,
            self._size,
        )
        parts: list[bytes | memoryview] = [header]
        parts += [np.ascontiguousarray(vector, "<f4").data for vector in vectors]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        write_secret(self._proposed, *parts, digest.digest())

    def settle(self, round_number: int, attempt: int, slots: tuple[int, ...]) -> None:
        """A round's sum is open: remember what was proposed if it is in it, and drop it if not."""
        place = self._proposed_place() if self._count else None
        if place is None or place.round > round_number:
            return
        if (place.round, place.attempt) == (round_number, attempt) and place.slot in slots:
            self._proposed.replace(self._kept)
        else:
            delete_secret(self._proposed)

    def _proposed_place(self) -> SumPlace | None:
        try:
            with self._proposed.open("rb") as file:
                header = file.read(_HEADER.size)
            _, _, round_number, attempt, slot, _, _ = _HEADER.unpack(header)
        except FileNotFoundError:
            return None
        except struct.error:  # whether it was accepted cannot be told: `vectors` shall refuse
            _log.warning("memory lost", run=self._run_id.hex()[:8])
            self._proposed.replace(self._kept)
            return None
        return SumPlace(round_number, attempt, slot)

    def _read(self) -> Memory:
        with self._kept.open("rb") as file:
            expected = _HEADER.size + 4 * self._size * self._count + _DIGEST_BYTES
            found = os.fstat(file.fileno()).st_size
            header = file.read(_HEADER.size)
            digest = hashlib.sha256(header)
            vectors = [np.fromfile(file, "<f4", self._size) for _ in range(self._count)]
            for vector in vectors:
                digest.update(vector.data)
            whole = found == expected and file.read() == digest.digest()
        if not whole or header[:24] != _MAGIC + self._run_id:
            raise Refused(
                Reason.TRAINING_FAILED,
                f"expected what this device remembers of the run in {expected} whole bytes, found "
                f"{found} that are not; it can take part in another run",
            )
        return tuple(vector.astype(np.float32, copy=False) for vector in vectors)


def forget_memory(folder: Path) -> None:
    """The run in this folder is over."""
    for name in (_FILE, _PROPOSED):
        delete_secret(folder / name)
