"""ArtifactService: bytes up into the open round, bytes down from what is published."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import grpc

from coordinator.published import Published, not_published
from coordinator.round_sum import Upload, UploadKind
from coordinator.services.access import calling_peer, refusing
from coordinator.services.limits import Admission
from coordinator.services.turns import Turn, Turns
from coordinator.supervision import Unfinished
from fedloom.artifacts import ArtifactReference, PartialFile
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

    def __init__(
        self,
        published: Published,
        rounds: Rounds,
        admission: Admission,
        unfinished: Unfinished | None = None,
    ) -> None:
        self._published = published
        self._rounds = rounds
        self._admission = admission
        self._unfinished = unfinished or Unfinished()
        self._uploading: dict[Path, _OpenUpload] = {}
        self._turns = Turns()

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
            agent = calling_peer(context).name
            await call.transfer(agent)
            upload = _upload(agent, await _header(request_iterator))
            path = self._rounds.upload_path(upload)
            if path is None:
                yield artifact_pb2.UploadArtifactResponse(resume_from=upload.artifact.size_bytes)
                yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())
                return
            await call.memory(upload.artifact.size_bytes)
            async with self._opened(path) as opened:
                if path.is_file():  # whole, and not counted before we were killed
                    size = upload.artifact.size_bytes
                    yield artifact_pb2.UploadArtifactResponse(resume_from=size)
                else:
                    with PartialFile(path.with_suffix(".part"), upload.artifact) as file:
                        async with self._turns.turn() as turn:
                            opened.begin(self._receive(upload, file, request_iterator, turn))
                            yield artifact_pb2.UploadArtifactResponse(resume_from=file.size_bytes)
                            await opened.received()
                        self._rounds.upload_path(upload)  # still wanted? its folder may be gone
                        file.finish(path)
                await self._unfinished.finish(self._rounds.accept_upload(upload, path))
            yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())

    @asynccontextmanager
    async def _opened(self, path: Path) -> AsyncIterator["_OpenUpload"]:
        """End an older stream of the same upload: its connection may be half-open for a while."""
        while (older := self._uploading.get(path)) is not None:
            if not await older.interrupted():
                raise Refused(Reason.INTERNAL, "the same upload is still open on another stream")
        opened = self._uploading[path] = _OpenUpload()
        try:
            yield opened
        finally:
            opened.end()
            del self._uploading[path]

    async def _receive(
        self,
        upload: Upload,
        file: PartialFile,
        requests: AsyncIterator[artifact_pb2.UploadArtifactRequest],
        turn: Turn,
    ) -> None:
        checked = time.monotonic()
        while not file.complete:
            request = await turn.take(_next(requests))
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
            self._rounds.count_traffic(upload.agent, sent=len(request.part))
        await _let_go(requests)

    # A coroutine that writes is as good to gRPC as a generator, which its stubs ask for.
    async def DownloadArtifact(  # type: ignore[override]  # noqa: N802 - gRPC's name
        self,
        request: artifact_pb2.DownloadArtifactRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Send a published artifact from the offset asked for."""
        async with (
            refusing(context, "DownloadArtifact"),
            self._admission.call(context.peer()) as call,
        ):
            agent = calling_peer(context).name
            await call.transfer(agent)
            named = len(request.sha256) == 32
            size = await self._published.find(request.sha256) if named else None
            if size is None:
                raise not_published(request.sha256)
            if request.offset > size:
                raise Refused(Reason.MALFORMED, f"expected an offset of at most {size}")
            await call.memory(size - request.offset)
            header = artifact_pb2.DownloadHeader(size_bytes=size)
            await context.write(artifact_pb2.DownloadArtifactResponse(header=header))
            async with (
                self._turns.turn() as turn,
                aclosing(self._published.stream(request.sha256, request.offset)) as parts,
            ):
                async for part in parts:
                    answer = artifact_pb2.DownloadArtifactResponse(part=part)
                    await turn.take(_write(context, answer))
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


async def _let_go(requests: AsyncIterator[artifact_pb2.UploadArtifactRequest]) -> None:
    """Read no more. gRPC's iterator and the generator in it, which holds the last part, refer to
    each other: else every upload would leave 256 KiB to the next full garbage collection.
    """
    await cast(AsyncGenerator[artifact_pb2.UploadArtifactRequest, None], aiter(requests)).aclose()


async def _write(
    context: grpc.aio.ServicerContext[Any, Any], answer: artifact_pb2.DownloadArtifactResponse
) -> None:
    await context.write(answer)


def _upload(agent: str, header: artifact_pb2.UploadHeader) -> Upload:
    artifact = ArtifactReference(header.sha256, header.size_bytes)
    opened = header.kind == artifact_pb2.UPLOAD_KIND_OPENED_SUM
    kind = UploadKind.OPENED_SUM if opened else UploadKind.UPDATE
    return Upload(agent, header.run_id, header.round, header.attempt, artifact, kind)
