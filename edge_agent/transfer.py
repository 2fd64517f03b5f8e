"""Artifacts up and down: resumed by offset after every cut, given up only by a refusal.

There is no timeout on a transfer: keepalive (`fedloom/channels.py`) ends a dead connection, and a
slow one is welcome.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from edge_agent.connection import Backoff, Unreachable, understood
from edge_agent.shared_members import link_known_members
from fedloom.artifacts import ArtifactReference, PartialFile, read_parts, reference_of
from fedloom.errors import Reason, Refused
from fedloom.plans import PLAN_FILE, Plan, parse_plan
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc

FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 30.0
_PASSING = {Reason.INTERNAL, Reason.BUSY}  # a full disk is not: the round goes on without us
_log = structlog.get_logger()


@dataclass(frozen=True)
class Transfer:
    """Moves artifacts over one channel."""

    channel: grpc.aio.Channel
    address: str

    async def upload(self, header: artifact_pb2.UploadHeader, path: Path) -> None:
        """Send the file until the coordinator has stored it; raises its Refused."""
        await self._until_done(lambda: self._upload_once(header, path))

    async def download(self, artifact: ArtifactReference, destination: Path) -> None:
        """Fetch the artifact to `destination` unless a whole copy is there already."""
        if await asyncio.to_thread(_is_whole, destination, artifact):
            return
        partial = destination.with_name(f"{artifact.sha256.hex()}.part")
        await self._until_done(lambda: self._download_once(artifact, partial, destination))

    async def download_plan(
        self,
        reference: ArtifactReference,
        folder: Path,
        require_room: Callable[[Plan, Path], None],
    ) -> Plan:
        """Fetch a plan, and the members that it names if `require_room` does not refuse them.

        Members that another plan beside `folder` has are linked, not fetched.
        Raises Refused: PLAN_MISMATCH for other bytes than the plan's.
        """
        path = folder / PLAN_FILE
        try:
            await self.download(reference, path)
            plan = parse_plan(await asyncio.to_thread(path.read_bytes))
            await asyncio.to_thread(link_known_members, plan, folder)
            await asyncio.to_thread(require_room, plan, folder)
            for member in plan.members:
                wanted = ArtifactReference(member.sha256, member.size_bytes)
                await self.download(wanted, folder / member.name)
        except Refused as refused:
            if refused.reason is not Reason.DIGEST_MISMATCH:
                raise
            raise Refused(Reason.PLAN_MISMATCH, refused.subject) from refused
        return plan

    async def _until_done(self, attempt: Callable[[], Awaitable[None]]) -> None:
        backoff = Backoff(FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS)
        while True:
            backoff.attempt()
            try:
                return await attempt()
            except grpc.aio.AioRpcError as error:
                cause = understood(error, self.address)
            if isinstance(cause, Refused) and cause.reason not in _PASSING:
                raise cause
            if isinstance(cause, Unreachable) and cause.hopeless:
                raise cause
            seconds = backoff.pause(cause)
            _log.info("transfer interrupted", cause=str(cause), retry_seconds=round(seconds, 1))
            await asyncio.sleep(seconds)

    async def _upload_once(self, header: artifact_pb2.UploadHeader, path: Path) -> None:
        offset: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stub = artifact_pb2_grpc.ArtifactServiceStub(self.channel)
        call = stub.UploadArtifact(_upload_steps(header, path, offset))
        try:
            async for answer in call:
                if answer.WhichOneof("step") == "stored":
                    return
                if not offset.done():
                    offset.set_result(min(answer.resume_from, header.size_bytes))
        finally:
            offset.cancel()
            call.cancel()
        raise Refused(Reason.MALFORMED, "expected `stored`, found the end of the upload")

    async def _download_once(
        self, artifact: ArtifactReference, partial: Path, destination: Path
    ) -> None:
        with PartialFile(partial, artifact) as file:
            request = artifact_pb2.DownloadArtifactRequest(
                sha256=artifact.sha256, offset=file.size_bytes
            )
            call = artifact_pb2_grpc.ArtifactServiceStub(self.channel).DownloadArtifact(request)
            async for answer in call:
                if answer.WhichOneof("step") == "part":
                    file.append(answer.part)
                elif answer.header.size_bytes != artifact.size_bytes:
                    raise Refused(
                        Reason.DIGEST_MISMATCH,
                        f"expected {artifact.size_bytes} bytes, found {answer.header.size_bytes}",
                    )
            file.finish(destination)


async def _upload_steps(
    header: artifact_pb2.UploadHeader, path: Path, offset: asyncio.Future[int]
) -> AsyncIterator[artifact_pb2.UploadArtifactRequest]:
    yield artifact_pb2.UploadArtifactRequest(header=header)
    for part in read_parts(path, await offset):
        yield artifact_pb2.UploadArtifactRequest(part=part)


def _is_whole(path: Path, artifact: ArtifactReference) -> bool:
    there = path.is_file() and path.stat().st_size == artifact.size_bytes
    return there and reference_of(path) == artifact
