"""An enrolled peer that speaks the protocol by hand, to say what a proper agent never would."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

import crypto
from edge_agent.identity import Identity
from fedloom.channels import CLIENT_OPTIONS
from fedloom.errors import Reason, refused_from_rpc
from fedloom.plans import Plan
from fedloom.terms import Encoding, LocalTraining, Protection, clip_of
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc, control_pb2, control_pb2_grpc
from tests.integration.federation import PATIENCE_SECONDS

Step = control_pb2.ConnectRequest


@asynccontextmanager
async def refused(reason: Reason, about: str = "") -> AsyncIterator[None]:
    """Expect that the coordinator ends the RPC in the block with this reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield
    found = refused_from_rpc(caught.value)
    assert found is not None, caught.value
    assert found.reason is reason, found
    assert about in found.subject


class RawControl:
    """A control stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = control_pb2_grpc.ControlServiceStub(channel).Connect()

    async def send(self, **step: Any) -> None:
        """Send one step."""
        await self.call.write(Step(**step))

    async def hello(self, identity: Identity, **fields: Any) -> None:
        """Introduce the agent properly, but for `fields`, and await the welcome."""
        hello: dict[str, Any] = {
            "protocol_version": 1,
            "protections": [control_pb2.PROTECTION_PLAIN, control_pb2.PROTECTION_ENCRYPTED],
            "exchange_key": identity.advertised_exchange_key(),
        }
        await self.send(hello=control_pb2.Hello(**(hello | fields)))
        await self.receive("welcome")

    async def receive(self, step: str) -> control_pb2.ConnectResponse:
        """Return the next message, which must be this step."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            message = await self.call.read()
        assert isinstance(message, control_pb2.ConnectResponse), message
        assert message.WhichOneof("step") == step, message
        return message

    async def ended(self) -> None:
        """Read to the stream's end; raises what ended it."""
        while await self.call.read() is not grpc.aio.EOF:
            pass
        raise await end_of(self.call)


@asynccontextmanager
async def raw_channel(identity: Identity) -> AsyncIterator[grpc.aio.Channel]:
    """Open a channel as this agent."""
    credentials = identity.channel_credentials()
    address = identity.control_address
    async with grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS) as channel:
        yield channel


@dataclass(frozen=True)
class Upload:
    """An update's bytes with the header that belongs to them."""

    header: artifact_pb2.UploadHeader
    content: bytes

    def but(self, **fields: Any) -> artifact_pb2.UploadHeader:
        """Return the header with other fields."""
        changed = artifact_pb2.UploadHeader()
        changed.CopyFrom(self.header)
        for name, value in fields.items():
            setattr(changed, name, value)
        return changed


def upload_of(cohort: control_pb2.Cohort, content: bytes) -> Upload:
    """Return the upload of these bytes to this cohort."""
    header = artifact_pb2.UploadHeader(
        run_id=cohort.run_id,
        round=cohort.round,
        attempt=cohort.attempt,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).digest(),
    )
    return Upload(header, content)


def encoded_update(
    plan: Plan, cohort: control_pb2.Cohort, slot: int, value: float, weight: int
) -> bytes:
    """Encode an update of equal values for protection `plain`; nothing is checked here."""
    encoding, training = Encoding(Protection.PLAIN, 10), LocalTraining(learning_rate=1e-2)
    context = crypto.UpdateContext(
        run_id=cohort.run_id,
        round=cohort.round,
        attempt=cohort.attempt,
        parameter_count=plan.parameter_count,
        capacity=encoding.capacity,
        weight_cap=cohort.weight_cap,
        clip=clip_of(encoding, training, cohort.weight_cap),
    )
    rounding = np.random.default_rng(0)
    encoder = crypto.protection("plain").encoder(context, slot, None, rounding)
    zeros = np.zeros(plan.parameter_count, np.float32)
    header_and_weight = next(encoder.encode(zeros, 1))
    values = np.full(plan.parameter_count, value, "<f4").tobytes()
    return header_and_weight[:-8] + weight.to_bytes(8, "little") + values


async def upload(
    channel: grpc.aio.Channel,
    header: artifact_pb2.UploadHeader,
    parts: Iterable[bytes],
    cut: bool = False,
) -> int:
    """Send an upload and return the offset that the coordinator asked for; `cut` breaks it off.

    What lies before that offset is left out, as an agent that resumes does.
    """
    call = artifact_pb2_grpc.ArtifactServiceStub(channel).UploadArtifact()
    await call.write(artifact_pb2.UploadArtifactRequest(header=header))
    answer = await call.read()
    if not isinstance(answer, artifact_pb2.UploadArtifactResponse):
        raise await end_of(call)
    position = 0
    for part in parts:
        rest = part[max(0, answer.resume_from - position) :]
        position += len(part)
        try:
            if rest:
                await call.write(artifact_pb2.UploadArtifactRequest(part=rest))
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            break  # refused already: the end of the call says why
    if cut:
        await asyncio.sleep(0.2)  # what arrives with the cut is lost, and the tests count parts
        call.cancel()
        return answer.resume_from
    await call.done_writing()
    stored = await call.read()
    if not isinstance(stored, artifact_pb2.UploadArtifactResponse):
        raise await end_of(call)
    assert stored.WhichOneof("step") == "stored"
    return answer.resume_from


async def end_of(call: Any) -> grpc.aio.AioRpcError:
    """Return what ended a call that was read to its end."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        await call.details(),
    )


async def download(channel: grpc.aio.Channel, sha256: bytes, offset: int = 0) -> bytes:
    """Return the bytes of a published artifact from the offset on."""
    stub = artifact_pb2_grpc.ArtifactServiceStub(channel)
    call = stub.DownloadArtifact(artifact_pb2.DownloadArtifactRequest(sha256=sha256, offset=offset))
    return b"".join([answer.part async for answer in call])


def pieces(content: bytes, size: int) -> list[bytes]:
    """Cut bytes into pieces."""
    return [content[start : start + size] for start in range(0, len(content), size)]
