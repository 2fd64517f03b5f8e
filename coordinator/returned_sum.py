"""The opened sum of a round as an agent returns it, under `release = "coordinator"`.

It counts only with the hash that the other agents reported: see `coordinator.phases.applying`.
"""

import asyncio
from pathlib import Path

import crypto
from coordinator.published import Published
from coordinator.round_sum import Upload, refused_by_crypto
from coordinator.run_state import Phase, RunState
from fedloom.artifacts import ArtifactReference, read_parts
from fedloom.errors import Reason, Refused


class ReturnedSum:
    """What is wanted from the agent that was asked, and what came."""

    def __init__(self, context: crypto.UpdateContext, slots: tuple[int, ...], spool: Path) -> None:
        self._context = context
        self._slots = slots
        self._spool = spool

    def path_for(self, upload: Upload, state: RunState) -> Path:
        """Return where to spool the opened sum; raises Refused for another than the agreed one."""
        wanted = state.phase is Phase.RETURNING and upload.agent == state.returning
        if not wanted or state.agreed is None or upload.round != state.round:
            raise Refused(Reason.WRONG_ROUND, "expected no opened sum of this agent now")
        size = crypto.protection("plain").accumulator(self._context).encoded_sum_size
        if upload.artifact.size_bytes != size:
            raise Refused(
                Reason.MALFORMED,
                f"expected an opened sum of {size} bytes, found {upload.artifact.size_bytes}",
            )
        if upload.artifact.sha256 != state.agreed.opened_sha256:
            raise Refused(Reason.STATE_DIVERGED, "expected the opened sum that most agents report")
        self._spool.mkdir(parents=True, exist_ok=True)
        return self._spool / f"{upload.artifact.sha256.hex()}.opened"

    async def publish(self, path: Path, published: Published) -> ArtifactReference:
        """Validate and keep the opened sum; raises Refused."""
        try:
            return await asyncio.to_thread(self._publish, path, published)
        except crypto.CryptoError as error:
            raise refused_by_crypto(error) from error

    def _publish(self, path: Path, published: Published) -> ArtifactReference:
        with path.open("rb", buffering=0) as file:
            crypto.protection("plain").open_sum(self._context, None, self._slots, file)
        return published.put(iter(read_parts(path, 0)))
