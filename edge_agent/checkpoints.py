"""A training's state on disk, so that a device that dies goes on where it was, to the last bit.

One file in the run's folder, mode 0600: it holds what this device has learnt from its data. All
little-endian:

    8 bytes   magic, with the format's version
    16 bytes  run
    u64       round
    32 bytes  subject: SHA-256 of what determines the training's bits (`training_subject`)
    u64       P, length of a vector
    u64       number of vectors
    u64       steps done
    3 f64     sums of losses and of weights over these steps; seconds trained
    f32       the vectors, each (P,): the trained values, then what the optimiser keeps
    32 bytes  SHA-256 of everything before

No random state is in it: the order of the data follows from the seed, the epoch and the number of
steps done (`batches.training_batches`).

A new file replaces the old one by a rename after it has been synced: whatever cuts the power, one
of the two is there and whole. The rename itself is not waited for; the older file is as good.
"""

import hashlib
import math
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import structlog
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.secret_files import delete_secret, write_secret
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining
from fedloom.version import software

INTERVAL_SECONDS = 20.0  # between saves, at least: flash memory wears out
PAUSE_PER_SAVE = 100.0  # seconds of training for each second of saving, at least
_FILE = "training.checkpoint"
_MAGIC = b"FDLCKPT\1"
_HEADER = struct.Struct("<8s16sQ32sQQQddd")
_DIGEST_BYTES = 32
_log = structlog.get_logger()


@dataclass
class TrainingState:
    """A training between two steps, moved in place: all that its next step depends on."""

    subject: bytes  # see `training_subject`
    steps: int  # of the whole training
    vectors: tuple[NDArray[np.float32], ...]  # each (T,); the trained values, the optimiser's
    step: int = 0  # how many are done
    loss_sum: float = 0.0  # over these
    weight_sum: float = 0.0

    @property
    def trained(self) -> Theta:
        """The trained values, (P,)."""
        return self.vectors[0]

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step == self.steps


def training_subject(
    theta: Theta,
    terms: LocalTraining,
    order_seed: int,
    data_sha256: bytes,
    linear: Theta | None = None,
    parts: Parts | None = None,
) -> bytes:
    """Return the SHA-256 of everything that a training's bits follow from.

    The software is part of it: another version may order the data in another way. `linear` is what
    the strategy adds to every gradient: what this device remembers shows in nothing else.
    """
    digest = hashlib.sha256(f"{software()}, numpy {np.__version__}\n".encode())
    digest.update(struct.pack("<QQ", order_seed, len(theta)))
    digest.update(np.ascontiguousarray(theta, "<f4").data)
    digest.update(data_sha256)
    if linear is not None:
        digest.update(np.ascontiguousarray(linear, "<f4").data)
    digest.update(repr(parts).encode())
    digest.update(terms.to_message().SerializeToString(deterministic=True))
    return digest.digest()


class Checkpoint:
    """What outlives the process of one training, that of `round_number` in a run.

    When to save is decided by time: a save that took d seconds is followed by at least
    INTERVAL_SECONDS and at least PAUSE_PER_SAVE x d of training. So however slow the disk is, all
    saves but the last take less than 1 % of the training's time, and a kill costs no more than one
    pause and the step in hand. A finished training is saved at once, without the optimiser's
    vectors: its update is not trained again.
    """

    def __init__(
        self,
        folder: Path,
        run_id: bytes,
        round_number: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._run_id = run_id
        self._round = round_number
        self._clock = clock
        self._began = clock()
        self._earlier_seconds = 0.0
        self._next_save = self._began + INTERVAL_SECONDS
        self._log = _log.bind(run=run_id.hex()[:8], round=round_number)

    @property
    def seconds(self) -> float:
        """How long this training has taken, in this process and in those that it goes on from."""
        return self._earlier_seconds + self._clock() - self._began

    def load(self, fresh: TrainingState) -> TrainingState:
        """Return the kept state of the very training that `fresh` begins, or `fresh` itself.

        A file that is damaged or belongs to anything else is logged and deleted.
        """
        try:
            with (self._folder / _FILE).open("rb") as file:
                state = self._read(file, fresh)
        except FileNotFoundError:
            return fresh
        except (OSError, _Unusable) as error:
            self._log.warning("checkpoint ignored", problem=str(error))
            self.discard()
            return fresh
        self._log.info("training resumed", step=state.step, steps=state.steps)
        return state

    def save(self, state: TrainingState) -> None:
        """Keep the state when it is time to; call it after every step.

        A disk that does not take it costs the training nothing: the older state stays.
        """
        started = self._clock()
        if started < self._next_save and not state.finished:
            return
        try:
            self._write(state)
        except OSError as error:
            self._log.warning("checkpoint not saved", problem=str(error.strerror))
        ended = self._clock()
        self._next_save = ended + max(INTERVAL_SECONDS, PAUSE_PER_SAVE * (ended - started))

    def discard(self) -> None:
        """Delete what was kept; the training is of no use any more."""
        discard_checkpoint(self._folder)

    def _write(self, state: TrainingState) -> None:
        kept = state.vectors[:1] if state.finished else state.vectors
        header = _HEADER.pack(
            _MAGIC,
            self._run_id,
            self._round,
            state.subject,
            len(state.trained),
            len(kept),
            state.step,
            state.loss_sum,
            state.weight_sum,
            self.seconds,
        )
        # Views: a second copy of the vectors would double the memory that a training needs.
        parts: list[bytes | memoryview] = [header]
        parts += [np.ascontiguousarray(vector, "<f4").data for vector in kept]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        write_secret(self._folder / _FILE, *parts, digest.digest())

    def _read(self, file: BinaryIO, fresh: TrainingState) -> TrainingState:
        """Read and validate; whatever is not as it was written is _Unusable."""
        header = file.read(_HEADER.size)
        _require("bytes of header", _HEADER.size, len(header))
        magic, run_id, round_number, subject, parameters, count, *rest = _HEADER.unpack(header)
        step, loss_sum, weight_sum, seconds = rest
        _require("magic", _MAGIC, magic)
        _require("run", self._run_id, run_id)
        _require("round", self._round, round_number)
        _require("parameters", len(fresh.trained), parameters)
        _require("subject", fresh.subject, subject)
        _require("a step of this training", True, 1 <= step <= fresh.steps)
        _require("vectors", 1 if step == fresh.steps else len(fresh.vectors), count)
        sums_usable = math.isfinite(loss_sum) and 0 < weight_sum < math.inf
        _require("usable sums", True, sums_usable and 0 <= seconds < math.inf)
        size = _HEADER.size + 4 * parameters * count + _DIGEST_BYTES
        _require("bytes", size, os.fstat(file.fileno()).st_size)
        digest = hashlib.sha256(header)
        vectors = tuple(np.fromfile(file, "<f4", parameters) for _ in range(count))
        for vector in vectors:
            digest.update(vector.data)
        _require("SHA-256", digest.digest(), file.read())
        self._earlier_seconds = seconds
        native = tuple(vector.astype(np.float32, copy=False) for vector in vectors)
        return TrainingState(subject, fresh.steps, native, step, loss_sum, weight_sum)


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a training of the run in this folder left something behind."""
    return (folder / _FILE).exists()


def discard_checkpoint(folder: Path) -> None:
    """Delete what a training of the run in this folder left behind, half a file included."""
    try:
        delete_secret(folder / _FILE)
    except OSError as error:
        _log.warning("checkpoint not deleted", problem=str(error.strerror))


class _Unusable(Exception):
    """The file is no state of this training."""


def _require(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise _Unusable(f"expected {what}: {_shown(expected)}, found {_shown(found)}")


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
