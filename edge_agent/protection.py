"""The device's side of a run's protection: updates out as files, sums in from files."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import structlog

import crypto
from crypto import groups, plain
from crypto.masks import Mask
from edge_agent.invitations import Cohort, Outcome, Terms
from edge_agent.local_rules import Outgoing
from edge_agent.optimisers import Vector
from edge_agent.seeds import rounding
from fedloom.artifacts import ArtifactReference, write_artifact
from fedloom.compression import Compression
from fedloom.errors import Reason, Refused
from fedloom.strategies.compressed import listed_values
from fedloom.strategies.grouped import combined
from fedloom.terms import Protection, clip_of

_log = structlog.get_logger()
_NAMES: dict[Protection, crypto.ProtectionName] = {
    Protection.PLAIN: "plain",
    Protection.MASKED: "masked",
    Protection.ENCRYPTED: "encrypted",
    Protection.SEALED: "sealed",
}
_REASONS: dict[type[crypto.CryptoError], Reason] = {
    crypto.NotFinite: Reason.NOT_FINITE,
    crypto.WeightOutOfRange: Reason.WEIGHT_OUT_OF_RANGE,
    crypto.PeerFault: Reason.SUM_NOT_VERIFIED,
    crypto.InvalidContext: Reason.MALFORMED,  # all of it comes from the coordinator's terms
    crypto.CryptoError: Reason.INTERNAL,
}


@dataclass(frozen=True)
class Place:
    """Where an update goes in its cohort, and what hides it there."""

    slot: int
    cohort_digest: bytes = b""
    masks: tuple[Mask, ...] | None = field(default=None, repr=False)  # None: no masks


class SumRefused(Refused):
    """A sum did not open under its key: its maker, once told, knows up to one bit about the key."""


class UpdateProtection:
    """Encodes and opens under one run's terms. Constant memory in the update's size."""

    def __init__(
        self,
        terms: Terms,
        update_length: Callable[[], int],
        agent_id: str,
        processes: int = 1,
        tail_length: int = 0,
        moved_length: Callable[[], int] = lambda: 0,
    ) -> None:
        """`update_length` gives U, what the strategy sends in the round after the state.

        `moved_length` gives R, what of theta its sum moves that no device sends.
        """
        self._terms = terms
        self._update_length = update_length
        self._moved_length = moved_length
        self._tail_length = tail_length  # M; the context calls both together its parameters
        self._agent_id = agent_id
        self._processes = processes
        with _refusing():
            self._protection = crypto.protection(_NAMES[terms.encoding.protection])

    def clip(self, weight_cap: int, derived: float) -> float:
        """Return the range of values in a round; `derived` follows from the round before it."""
        stated = self._terms.encoding.clip
        return stated or derived or clip_of(self._terms.encoding, self._terms.training, weight_cap)

    def limit(self, clip: float) -> float:
        """Return beyond which a value is cut, in a cohort of this clip."""
        return math.inf if self._terms.encoding.protection is Protection.PLAIN else clip

    def split(self, mean: Vector) -> tuple[Vector, Vector]:
        """Return what the strategy is given of an opened mean, (U + R,), and the tail, (M,)."""
        length = len(mean) - self._tail_length
        return mean[:length], mean[length:]

    def next_clip(self, clip: float, opened: crypto.OpenedSum) -> float:
        """Return what the round's histogram implies for the next one; 0 where nothing does."""
        if self._terms.encoding.clip or not opened.exponents:
            return 0.0
        return crypto.next_clip(clip, opened.exponents)

    def write_update(
        self,
        update: Outgoing,
        place: Place,
        cohort: Cohort,
        run_key: crypto.RunKey | None,
        path: Path,
    ) -> ArtifactReference:
        """Encode the update as this cohort's member into a file."""
        context = self._context(
            cohort.round, cohort.attempt, cohort.weight_cap, cohort.clip, place.cohort_digest
        )
        with _refusing():
            encoder = self._protection.encoder(
                context,
                place.slot,
                run_key,
                self._rounding(cohort.round),
                place.masks,
                self._processes,
            )
            return write_artifact(path, encoder.encode(update.scaled(cohort.clip), update.weight))

    def _rounding(self, round_number: int) -> np.random.Generator:
        return rounding(self._terms.training.seed, self._terms.run_id, round_number, self._agent_id)

    def open_sum(
        self, outcome: Outcome, clip: float, run_key: crypto.RunKey | None, path: Path
    ) -> crypto.OpenedSum:
        """Open a round's sum, or its groups' sums and what the terms' rule makes of them.

        Raises Refused(SUM_NOT_VERIFIED) unless it is of its members.
        """
        context = self._sum_context(
            outcome.round, outcome.attempt, outcome.weight_cap, clip, outcome.cohort_digest
        )

        def open_one(members: Sequence[int], source: crypto.Source) -> crypto.OpenedSum:
            return self._protection.open_sum(context, run_key, members, source, self._processes)

        training = self._terms.training
        with _refusing(), path.open("rb", buffering=0) as file:
            if not training.groups:
                return open_one(outcome.slots, file)
            rule, tail = partial(combined, training), self._tail_length
            return groups.open_sums(outcome.slots, training.groups, file, open_one, rule, tail)

    def write_opened(
        self, outcome: Outcome, clip: float, opened: crypto.OpenedSum, path: Path
    ) -> ArtifactReference:
        """Write an opened sum into a file, as protection `plain` encodes sums."""
        context = self._sum_context(outcome.round, outcome.attempt, outcome.weight_cap, clip)
        return write_artifact(
            path, plain.encoded_sum(context, opened.count, opened.total_weight, opened.mean)
        )

    def _context(
        self,
        round_number: int,
        attempt: int,
        weight_cap: int,
        clip: float,
        cohort_digest: bytes = b"",
    ) -> crypto.UpdateContext:
        length, training = self._update_length(), self._terms.training
        with _refusing():
            return crypto.UpdateContext(
                run_id=self._terms.run_id,
                round=round_number,
                attempt=attempt,
                parameter_count=length + self._tail_length,
                tail_length=self._tail_length,
                capacity=self._terms.encoding.capacity,
                weight_cap=weight_cap,
                clip=clip,
                update_bits=self._terms.encoding.update_bits,
                cohort=cohort_digest,
                listed=listed_values(training, length),
                quantised=training.compression is Compression.QUANTISED,
            )

    def _sum_context(
        self,
        round_number: int,
        attempt: int,
        weight_cap: int,
        clip: float,
        cohort_digest: bytes = b"",
    ) -> crypto.UpdateContext:
        """A sum may be longer than the updates in it: the server moves more than they do."""
        context = self._context(round_number, attempt, weight_cap, clip, cohort_digest)
        with _refusing():
            return replace(context, parameter_count=context.parameter_count + self._moved_length())


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what the mathematics refuses into what the coordinator is told."""
    try:
        yield
    except crypto.OpeningFailed as error:
        # What exactly did not fit tells the sum's maker about the key: it stays on this device.
        _log.warning("sum refused", problem=str(error))
        subject = "expected the sum of the accepted updates"
        raise SumRefused(Reason.SUM_NOT_VERIFIED, subject) from None
    except crypto.CryptoError as error:
        reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        raise Refused(reason, str(error)) from error
