"""The update that this device holds in an asynchronous run, until it is in a stored sum.

It was made from a state that the run may have left behind, so it cannot be trained again: it lies
in the run's folder from the end of its training, mode 0600. No update may be counted twice, whoever
dies when:

    keep      held.update    written whole, from its training's end
    propose   held.place     written before the first byte of an upload leaves: round, attempt, slot
    settle    both deleted   once a sum is open that has an update in this place, before the state
                             that includes it is written; a sum without it leaves the update here

and none may be in two sums that somebody could compare: one that this device has vouched for under
masks is spent, whatever became of the round (`crypto.cohort`). Little-endian:

    8 bytes   magic, with the format's version
    16 bytes  run
    u64 u64   number of rounds applied to the state that it was made from; round it was trained in
    u32 u64   weight; samples that it was made from
    2 f64     mean loss, seconds trained
    u64 u32   U, values; M, shares of the tail
    f32       values, shares
    32 bytes  SHA-256 of everything before
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog

from edge_agent.local_memory import SumPlace
from fedloom.secret_files import delete_secret, write_secret
from fedloom.strategies.arithmetic import Vector

_FILE, _PLACE = "held.update", "held.place"
_MAGIC = b"FDLHELD\1"
_HEADER = struct.Struct("<8s16sQQIQddQI")
_DIGEST_BYTES = 32
_log = structlog.get_logger()


@dataclass(frozen=True)
class HeldUpdate:
    """What a training gave, before it is known which sum takes it."""

    base_rounds: int  # applied to the state that it was made from
    round: int  # that it was trained in
    values: Vector  # (U,) float32, what the strategy holds
    shares: Vector  # (M,) float32 in 0..1, of the tail
    weight: int
    mean_loss: float
    seconds: float
    samples: int = 0  # that it was made from


class HeldUpdates:
    """At most one, in a run's folder."""

    def __init__(self, folder: Path, run_id: bytes) -> None:
        self._update = folder / _FILE
        self._place = folder / _PLACE
        self._run_id = run_id

    def keep(self, update: HeldUpdate) -> None:
        """Hold this update, of which nothing was sent yet."""
        self.drop()
        header = _HEADER.pack(
            _MAGIC,
            self._run_id,
            update.base_rounds,
            update.round,
            update.weight,
            update.samples,
            update.mean_loss,
            update.seconds,
            len(update.values),
            len(update.shares),
        )
        body = [np.ascontiguousarray(v, "<f4").tobytes() for v in (update.values, update.shares)]
        digest = hashlib.sha256(b"".join([header, *body])).digest()
        write_secret(self._update, header, *body, digest)

    def read(self) -> HeldUpdate | None:
        """Return the update that is held; None without one that is whole."""
        try:
            data = self._update.read_bytes()
        except FileNotFoundError:
            return None
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        whole = len(body) >= _HEADER.size and hashlib.sha256(body).digest() == digest
        if not whole or body[:24] != _MAGIC + self._run_id:
            _log.warning("held update lost", run=self._run_id.hex()[:8])
            self.drop()
            return None
        _, _, base, trained_in, weight, samples, *rest = _HEADER.unpack_from(body)
        loss, seconds, length, tail = rest
        vectors = np.frombuffer(body, "<f4", length + tail, _HEADER.size).astype(np.float32)
        values, shares = vectors[:length], vectors[length:]
        return HeldUpdate(base, trained_in, values, shares, weight, loss, seconds, samples)

    def propose(self, place: SumPlace) -> None:
        """Remember where the update goes, before anything of it does."""
        write_secret(self._place, json.dumps(asdict(place)).encode())

    @property
    def proposed(self) -> SumPlace | None:
        """Where the update went last; None when it went nowhere."""
        try:
            return SumPlace(**json.loads(self._place.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # where it went cannot be told: it must go nowhere else
            _log.warning("held update dropped: its place is lost", run=self._run_id.hex()[:8])
            self.drop()
            return None

    def settle(self, round_number: int, attempt: int, slots: tuple[int, ...]) -> None:
        """A round's sum is open: drop the update if it is in it."""
        place = self.proposed
        if place is None or place.round > round_number:
            return
        if (place.round, place.attempt) == (round_number, attempt) and place.slot in slots:
            self.drop()
        else:
            delete_secret(self._place)

    def drop(self) -> None:
        """Hold nothing."""
        delete_secret(self._update)  # first: without its place it would look as if never sent
        delete_secret(self._place)
