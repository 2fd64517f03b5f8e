"""ArtifactService: bytes up into the open round, bytes down from what is published."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

import grpc
import structlog

from coordinator.published import Published, not_published
from coordinator.round_sum import Upload, UploadKind
from coordinator.services.access import calling_peer, refusing
from coordinator.services.turns import Turns
from coordinator.supervision import Unfinished
from fedloom.artifacts import ArtifactReference, PartialFile
from fedloom.errors import Reason, Refused
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc

_log = structlog.get_logger()


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
        unfinished: Unfinished | None = None,
    ) -> None:
        self._published = published
        self._rounds = rounds
        self._unfinished = unfinished or Unfinished()
        self._uploading: set[Path] = set()
        self._turns = Turns()

    async def UploadArtifact(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[artifact_pb2.UploadArtifactRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[artifact_pb2.UploadArtifactResponse]:
        """Spool the parts, then have the whole update counted."""
        async with refusing(context, "UploadArtifact"):
            agent = calling_peer(context).name
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("step") != "header":
                raise Refused(Reason.MALFORMED, "expected an upload's header first")
            upload = _upload(agent, first.header)
            path = self._rounds.upload_path(upload)
            if path is None:
                yield artifact_pb2.UploadArtifactResponse(resume_from=upload.artifact.size_bytes)
                yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())
                return
            if path in self._uploading:
                raise Refused(Reason.INTERNAL, "the same upload is still open on another stream")
            self._uploading.add(path)
            try:
                if path.is_file():  # whole, and not counted before we were killed
                    size = upload.artifact.size_bytes
                    yield artifact_pb2.UploadArtifactResponse(resume_from=size)
                else:
                    with PartialFile(path.with_suffix(".part"), upload.artifact) as file:
                        yield artifact_pb2.UploadArtifactResponse(resume_from=file.size_bytes)
                        await self._receive(agent, file, request_iterator)
                        self._rounds.upload_path(upload)  # still wanted? its folder may be gone
                        file.finish(path)
                await self._unfinished.finish(self._rounds.accept_upload(upload, path))
            finally:
                self._uploading.discard(path)
            yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())

    async def _receive(
        self,
        agent: str,
        file: PartialFile,
        requests: AsyncIterator[artifact_pb2.UploadArtifactRequest],
    ) -> None:
        while not file.complete:
            request = await self._turns.take(_next(requests))
            if request is None or request.WhichOneof("step") != "part":
                raise Refused(
                    Reason.MALFORMED, f"expected a part at offset {file.size_bytes}, found none"
                )
            try:
                file.append(request.part)
            except Refused:
                file.discard()
                raise
            self._rounds.count_traffic(agent, sent=len(request.part))

    # A coroutine that writes is as good to gRPC as a generator, which its stubs ask for.
    async def DownloadArtifact(  # type: ignore[override]  # noqa: N802 - gRPC's name
        self,
        request: artifact_pb2.DownloadArtifactRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Send a published artifact from the offset asked for."""
        async with refusing(context, "DownloadArtifact"):
            agent = calling_peer(context).name
            named = len(request.sha256) == 32
            size = await self._published.find(request.sha256) if named else None
            if size is None:
                raise not_published(request.sha256)
            if request.offset > size:
                raise Refused(Reason.MALFORMED, f"expected an offset of at most {size}")
            header = artifact_pb2.DownloadHeader(size_bytes=size)
            await context.write(artifact_pb2.DownloadArtifactResponse(header=header))
            async with aclosing(self._published.stream(request.sha256, request.offset)) as parts:
                async for part in parts:
                    answer = artifact_pb2.DownloadArtifactResponse(part=part)
                    await self._turns.take(_write(context, answer))
                    self._rounds.count_traffic(agent, received=len(part))


async def _next(
    requests: AsyncIterator[artifact_pb2.UploadArtifactRequest],
) -> artifact_pb2.UploadArtifactRequest | None:
    return await anext(requests, None)


async def _write(
    context: grpc.aio.ServicerContext[Any, Any], answer: artifact_pb2.DownloadArtifactResponse
) -> None:
    await context.write(answer)


def _upload(agent: str, header: artifact_pb2.UploadHeader) -> Upload:
    artifact = ArtifactReference(header.sha256, header.size_bytes)
    opened = header.kind == artifact_pb2.UPLOAD_KIND_OPENED_SUM
    kind = UploadKind.OPENED_SUM if opened else UploadKind.UPDATE
    return Upload(agent, header.run_id, header.round, header.attempt, artifact, kind)
