"""ArtifactService: bytes up into the open round, bytes down from what is published."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Protocol

import grpc

from coordinator.round_sum import Upload
from coordinator.services.access import refusing, require_agent
from coordinator.services.limits import Admission
from coordinator.store import Store
from fedloom.artifacts import ArtifactReference, PartialFile, read_parts
from fedloom.errors import Reason, Refused
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc

PART_SECONDS = 600.0  # the largest part takes nine minutes at 16 kbit/s
STILL_WANTED_SECONDS = 1.0  # between two looks at whether the round still wants an upload
TAKE_OVER_SECONDS = 1.0


class Rounds(Protocol):
    """What the conductor says about uploads."""

    def upload_path(self, upload: Upload) -> Path | None:
        """Return where the update is spooled; None when it has been counted already.

        Raises Refused unless exactly this upload is wanted now.
        """

    async def accept_upload(self, upload: Upload, path: Path) -> None:
        """Validate and count the whole update, then delete the file; raises Refused."""

    def count_traffic(self, agent: str, *, sent: int = 0, received: int = 0) -> None:
        """Remember payload bytes by agent."""


class ArtifactService(artifact_pb2_grpc.ArtifactServiceServicer):
    """Moves artifacts; what they mean is the conductor's business."""

    def __init__(self, published: Path, store: Store, rounds: Rounds, admission: Admission) -> None:
        self._published = published  # folder of files named by their SHA-256 in hex
        self._store = store
        self._rounds = rounds
        self._admission = admission
        self._uploading: dict[Path, _OpenUpload] = {}

    async def UploadArtifact(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[artifact_pb2.UploadArtifactRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[artifact_pb2.UploadArtifactResponse]:
        """Spool the parts, then have the whole update counted."""
        async with (
            refusing(context, "UploadArtifact"),
            self._admission.call(context.peer()) as call,
        ):
            agent = require_agent(context, self._store)
            await call.transfer(agent)
            upload = _upload(agent, await _header(request_iterator))
            path = self._rounds.upload_path(upload)
            if path is None:
                yield artifact_pb2.UploadArtifactResponse(resume_from=upload.artifact.size_bytes)
                yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())
                return
            await call.memory(upload.artifact.size_bytes)
            await self._take_over(path)
            opened = self._uploading[path] = _OpenUpload()
            try:
                partial = path.with_suffix(".part")
                with PartialFile(partial, upload.artifact) as file:
                    opened.begin(self._receive(upload, file, request_iterator))
                    yield artifact_pb2.UploadArtifactResponse(resume_from=file.size_bytes)
                    await opened.received()
                    self._rounds.upload_path(upload)  # still wanted? its folder may be gone
                    file.finish(path)
                await self._rounds.accept_upload(upload, path)
            finally:
                opened.end()
                del self._uploading[path]
            yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())

    async def _take_over(self, path: Path) -> None:
        """End an older stream of the same upload: its connection may be half-open for a while."""
        while (older := self._uploading.get(path)) is not None:
            if not await older.interrupted():
                raise Refused(Reason.INTERNAL, "the same upload is still open on another stream")

    async def _receive(
        self,
        upload: Upload,
        file: PartialFile,
        requests: AsyncIterator[artifact_pb2.UploadArtifactRequest],
    ) -> None:
        checked = time.monotonic()
        while not file.complete:
            request = await _next(requests)
            if request is None or request.WhichOneof("step") != "part":
                raise Refused(
                    Reason.MALFORMED, f"expected a part at offset {file.size_bytes}, found none"
                )
            if (now := time.monotonic()) - checked > STILL_WANTED_SECONDS:
                self._rounds.upload_path(upload)  # else a slow agent sends for a round that is over
                checked = now
            try:
                file.append(request.part)
            except Refused:
                file.discard()
                raise
            except OSError as error:
                raise Refused(Reason.STORAGE_FULL, "the part could not be stored") from error
            self._rounds.count_traffic(upload.agent, sent=len(request.part))

    async def DownloadArtifact(  # noqa: N802 - gRPC's name
        self,
        request: artifact_pb2.DownloadArtifactRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[artifact_pb2.DownloadArtifactResponse]:
        """Send a published artifact from the offset asked for."""
        async with (
            refusing(context, "DownloadArtifact"),
            self._admission.call(context.peer()) as call,
        ):
            agent = require_agent(context, self._store)
            await call.transfer(agent)
            path = self._published / request.sha256.hex()
            if len(request.sha256) != 32 or not path.is_file():
                raise Refused(Reason.NOT_FOUND, f"expected a published artifact: {path.name[:64]}")
            size = path.stat().st_size
            if request.offset > size:
                raise Refused(Reason.MALFORMED, f"expected an offset of at most {size}")
            await call.memory(size - request.offset)
            yield artifact_pb2.DownloadArtifactResponse(
                header=artifact_pb2.DownloadHeader(size_bytes=size)
            )
            # Read on the loop: sums are in the page cache, and a hop to a thread and back for each
            # part costs more than it.
            for part in read_parts(path, request.offset):
                yield artifact_pb2.DownloadArtifactResponse(part=part)
                self._rounds.count_traffic(agent, received=len(part))


class _OpenUpload:
    """An upload whose parts are being received, so that a newer stream of it can take over."""

    def __init__(self) -> None:
        self._receiving: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    def begin(self, receiving: Coroutine[Any, Any, None]) -> None:
        """Receive from now on."""
        self._receiving = asyncio.create_task(receiving)
        # What ended it is looked at only while the call that it belongs to lives.
        self._receiving.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def received(self) -> None:
        """Wait until all parts are here; raises what ended that."""
        if self._receiving is None:
            raise AssertionError("nothing is received before it has begun")
        await asyncio.wait({self._receiving})
        if self._receiving.cancelled():
            raise Refused(Reason.INTERNAL, "a newer stream of the same upload took over")
        self._receiving.result()

    async def interrupted(self) -> bool:
        """Interrupt it and tell whether it has ended; one that is whole already is left alone."""
        if self._receiving is None or self._receiving.done():
            return False
        self._receiving.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), TAKE_OVER_SECONDS)
        return self._ended.is_set()

    def end(self) -> None:
        """Say that nothing is written to the file any more."""
        if self._receiving is not None:
            self._receiving.cancel()
        self._ended.set()


async def _header(
    requests: AsyncIterator[artifact_pb2.UploadArtifactRequest],
) -> artifact_pb2.UploadHeader:
    first = await _next(requests)
    if first is None or first.WhichOneof("step") != "header":
        raise Refused(Reason.MALFORMED, "expected an upload's header first")
    return first.header


async def _next(
    requests: AsyncIterator[artifact_pb2.UploadArtifactRequest],
) -> artifact_pb2.UploadArtifactRequest | None:
    try:
        async with asyncio.timeout(PART_SECONDS):
            return await anext(requests, None)
    except TimeoutError:
        raise Refused(Reason.MALFORMED, f"expected a step within {PART_SECONDS} s") from None


def _upload(agent: str, header: artifact_pb2.UploadHeader) -> Upload:
    artifact = ArtifactReference(header.sha256, header.size_bytes)
    return Upload(agent, header.run_id, header.round, header.attempt, artifact)
