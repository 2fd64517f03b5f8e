"""One attempt of a round: its cohort's updates, from the first upload to the stored sum.

Everything here can be built again after a restart: the accepted uploads lie in the spool until the
sum is stored, and the masks follow from the members' messages.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

import crypto
from coordinator.aggregation import MEAN, Aggregation
from coordinator.faults import StorageFault
from coordinator.masking import Masking
from coordinator.metrics import CryptoStep, Metrics
from coordinator.published import Published
from coordinator.round_sum import RoundSum, Upload
from coordinator.run_state import RunState
from coordinator.store import RoundRecord
from coordinator.strategies.factored_total import FactorRound
from crypto.masks import Correction
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.strategies.fedma import Layer
from fedloom.terms import Protection

_log = structlog.get_logger()


class Collection:
    """The sum of one cohort, and the masks in it where there are any."""

    def __init__(
        self,
        context: crypto.UpdateContext,
        protection: Protection,
        members: tuple[str, ...],
        spool: Path,
        masking: Masking | None,
        metrics: Metrics,
        crypto_processes: int = 1,
        aggregation: Aggregation = MEAN,
        layers: Sequence[Layer] = (),
        factors: FactorRound | None = None,
    ) -> None:
        self.context = context
        self._metrics = metrics
        self.masking = masking
        self.sum = RoundSum(
            context, protection, members, spool, crypto_processes, aggregation, layers, factors
        )
        self._members = members
        self._one_by_one = asyncio.Lock()
        self._closed = False

    async def add(self, upload: Upload, path: Path, place: Callable[[Upload], Path | None]) -> bool:
        """Bring one update after another into the sum; False for one that is in it already.

        `place` is asked again when it is the update's turn; it raises Refused for one that is not
        wanted any more.
        """
        with self._metrics.upload_waits():
            return await self._add(upload, path, place)

    async def _add(
        self, upload: Upload, path: Path, place: Callable[[Upload], Path | None]
    ) -> bool:
        async with self._one_by_one:
            if place(upload) is None:
                return False
            if self._closed:
                raise Refused(Reason.WRONG_ROUND, "expected an update before the sum was closed")
            with self._metrics.crypto(CryptoStep.ADD):
                await self.sum.add(upload, path)
            return True

    async def restore(self, uploads: Mapping[str, bytes]) -> bool:
        """Add the spooled updates that were accepted before a restart; False if one is missing."""
        for agent, sha256 in uploads.items():
            try:
                await self.sum.restore(agent, sha256)
            except (OSError, Refused) as error:
                _log.error("spooled update lost", agent=agent, error=type(error).__name__)
                return False
        return True

    def counted(self, agent: str, sha256: bytes) -> None:
        """Tell the cohort's protocol that an update is in the sum."""
        if self.masking is not None:
            self.masking.counted(self._members.index(agent), sha256)

    def close(self) -> None:
        """Accept no update any more."""
        self._closed = True
        if self.masking is not None:
            self.masking.close_uploads()

    async def stored(
        self, state: RunState, published: Published, seconds: float
    ) -> RoundRecord | None:
        """Publish the sum, without the masks left in it; None when that cannot be done.

        Raises StorageFault: the sum can be stored later, from what is in the spool.
        """
        correction = None
        if self.masking is not None:
            correction = await self.masking.settled(seconds)
            if correction is None:
                _log.warning("masks could not be taken out", round=state.round)
                return None
        try:
            with self._metrics.crypto(CryptoStep.STORE):
                reference = await asyncio.to_thread(self._put, published, correction)
        except StorageFault:
            raise
        except (OSError, crypto.LocalFault, crypto.UnusableUpdate) as error:
            _log.error("sum failed", error=type(error).__name__)
            return None
        return RoundRecord(
            state.round,
            state.attempt,
            self.context.weight_cap,
            self.sum.slots,
            reference,
            cohort_digest=self.context.cohort,
            key_id=state.keys.latest,
            previous_round=state.previous_round,
            clip=self.context.clip,
        )

    def _put(self, published: Published, correction: Correction | None) -> ArtifactReference:
        try:
            return published.put(self.sum.encoded(correction))
        except (crypto.SpoiledTotal, crypto.WorkerLost):
            self.sum.rebuild()
            return published.put(self.sum.encoded(correction))

    def discard(self) -> None:
        """Forget the sum and what is spooled of it."""
        if self.masking is not None:
            self.masking.close()
        self.sum.discard()
