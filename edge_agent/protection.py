"""The device's side of a run's protection: updates out as files, sums in from files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog

import crypto
from crypto.masks import Mask
from edge_agent.engine import LocalUpdate
from edge_agent.invitations import Outcome, Terms
from fedloom.artifacts import ArtifactReference, write_artifact
from fedloom.errors import Reason, Refused
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


class UpdateProtection:
    """Encodes and opens under one run's terms and key. Constant memory in the update's size."""

    def __init__(
        self,
        terms: Terms,
        parameter_count: int,
        run_key: crypto.RunKey | None,
        processes: int = 1,
    ) -> None:
        self._terms = terms
        self._parameter_count = parameter_count
        self._run_key = run_key
        self._processes = processes
        with _refusing():
            self._protection = crypto.protection(_NAMES[terms.encoding.protection])

    def write_update(
        self, update: LocalUpdate, place: Place, attempt: int, weight_cap: int, path: Path
    ) -> ArtifactReference:
        """Encode the update as this cohort's member into a file."""
        context = self._context(self._terms.round, attempt, weight_cap, place.cohort_digest)
        rounding = np.random.default_rng()  # rounds values up or down; nothing secret
        with _refusing():
            encoder = self._protection.encoder(
                context, place.slot, self._run_key, rounding, place.masks, self._processes
            )
            return write_artifact(path, encoder.encode(update.delta, update.samples))

    def open_sum(self, outcome: Outcome, path: Path) -> crypto.OpenedSum:
        """Open a round's sum; raises Refused(SUM_NOT_VERIFIED) unless it is of its members."""
        context = self._context(
            outcome.round, outcome.attempt, outcome.weight_cap, outcome.cohort_digest
        )
        with _refusing(), path.open("rb", buffering=0) as file:
            return self._protection.open_sum(
                context, self._run_key, outcome.slots, file, self._processes
            )

    def _context(
        self, round_number: int, attempt: int, weight_cap: int, cohort_digest: bytes
    ) -> crypto.UpdateContext:
        encoding = self._terms.encoding
        with _refusing():
            return crypto.UpdateContext(
                run_id=self._terms.run_id,
                round=round_number,
                attempt=attempt,
                parameter_count=self._parameter_count,
                capacity=encoding.capacity,
                weight_cap=weight_cap,
                clip=clip_of(encoding, self._terms.training, weight_cap),
                update_bits=encoding.update_bits,
                cohort=cohort_digest,
            )


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what the mathematics refuses into what the coordinator is told."""
    try:
        yield
    except crypto.OpeningFailed as error:
        # What exactly did not fit tells the sum's maker about the key: it stays on this device.
        _log.warning("sum refused", problem=str(error))
        raise Refused(Reason.SUM_NOT_VERIFIED, "expected the sum of the accepted updates") from None
    except crypto.CryptoError as error:
        reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        raise Refused(reason, str(error)) from error
