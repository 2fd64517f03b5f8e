"""What agents upload to an open run: updates, and sums that they opened for the operator."""

import asyncio
from dataclasses import replace
from pathlib import Path

import structlog

from coordinator.attempts import Attempts, OpenRun
from coordinator.contexts import context_of_round
from coordinator.events import SumReturned, Uploaded
from coordinator.facilities import Facilities
from coordinator.returned_sum import ReturnedSum
from coordinator.round_sum import Upload, UploadKind
from coordinator.run_state import Phase
from fedloom.errors import Reason, Refused


class Uploads:
    """Says what is wanted, and takes in what came."""

    def __init__(
        self,
        run: OpenRun,
        attempts: Attempts,
        facilities: Facilities,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._run = run
        self._attempts = attempts
        self._facilities = facilities
        self._log = log
        self._counting: set[asyncio.Task[None]] = set()

    def path_for(self, upload: Upload) -> Path | None:
        """Return where to spool the upload; None when it is counted; raises Refused."""
        self._run.require_whole()
        state, attempt = self._run.state, self._attempts.open
        if upload.kind is UploadKind.OPENED_SUM:
            return self._returned_sum().path_for(upload, state)
        late = state.phase is not Phase.COLLECTING and upload.agent not in state.uploaded
        if attempt is None or late:
            raise Refused(
                Reason.WRONG_ROUND,
                f"expected no upload in round {state.round}, {state.phase.value}",
            )
        if upload.agent in state.excluded:
            raise Refused(Reason.NOT_IN_COHORT, "expected a member that did not decline the round")
        if attempt.masking is not None and not attempt.masking.takes_uploads:
            raise Refused(Reason.WRONG_ROUND, "expected shares of all members before an update")
        return attempt.sum.path_for(upload)

    async def accept(self, upload: Upload, path: Path) -> None:
        """Take in what is spooled; raises Refused and leaves nothing."""
        accept = self._take_back if upload.kind is UploadKind.OPENED_SUM else self._count
        accepting = asyncio.create_task(accept(upload, path))
        self._counting.add(accepting)  # the loop itself keeps only weak references
        accepting.add_done_callback(self._counting.discard)
        # To the end even when the agent is cut meanwhile: what is in the sum must be counted.
        await asyncio.shield(accepting)

    async def _count(self, upload: Upload, path: Path) -> None:
        """Bring the update into the sum, if it is wanted still; a refused one is deleted."""
        attempt = self._attempts.open
        try:
            if attempt is None or not await attempt.add(upload, path, self.path_for):
                return
        except Refused:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise
        self._run.require_whole()
        if attempt is not self._attempts.open:
            return  # cancelled, or another attempt: that sum is not wanted any more
        self._log.info("update accepted", agent=upload.agent, bytes=upload.artifact.size_bytes)
        self._run.post(Uploaded(upload.agent, upload.artifact.sha256))

    async def _take_back(self, upload: Upload, path: Path) -> None:
        """Keep an opened sum that is the one that the agents agree on."""
        try:
            opened = await self._returned_sum().publish(path, self._facilities.published)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        if self.path_for(upload) is not None:  # still wanted?
            self._facilities.store.set_opened(self._run.run_id, upload.round, opened)
            self._run.post(SumReturned(upload.agent))

    def _returned_sum(self) -> ReturnedSum:
        run = self._run
        if not run.agents.history:
            raise Refused(Reason.WRONG_ROUND, "expected no opened sum before the first round")
        record = run.agents.history[-1]
        context = context_of_round(
            run.run_id, run.config, run.plan, record, len(run.agents.history) - 1
        )
        return ReturnedSum(replace(context, cohort=b""), record.slots, self._attempts.spool)
