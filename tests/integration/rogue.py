"""A coordinator made by hand, for one agent: it says what a test tells it to say, right or wrong.

It stands on the federation's own port, under its own certificate; nothing of the product's
coordinator decides anything here.
"""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

import crypto
from coordinator.authority import load_server_identity
from edge_agent.identity import Identity
from fedloom.adapters import Theta
from fedloom.errors import RULES, Reason, Refused, refusal_trailers
from fedloom.plans import PLAN_FILE
from fedloom.quality import EvaluationTerms, Report
from fedloom.terms import Encoding, LocalTraining, Protection, Release
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc, control_pb2, control_pb2_grpc
from tests.integration.federation import PARAMETERS, PATIENCE_SECONDS, Federation

RUN, OTHER_RUN = bytes(range(16)), bytes(range(1, 17))
PLAIN_CLIP = 1.0  # `plain` clips nothing, and still binds its updates to a number
WEIGHT_CAP = 32


@dataclass(frozen=True)
class Received:
    """What an agent uploaded."""

    header: artifact_pb2.UploadHeader
    content: bytes


class Rogue(control_pb2_grpc.ControlServiceServicer, artifact_pb2_grpc.ArtifactServiceServicer):
    """Both services, one after another for whoever comes."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}  # what can be downloaded, by its digest
        self.uploads: asyncio.Queue[Received] = asyncio.Queue()
        self.refuses_uploads: Refused | None = None
        self.refuses_streams: Refused | None = None
        self._to_say: asyncio.Queue[control_pb2.ConnectResponse] = asyncio.Queue()
        self._heard: asyncio.Queue[control_pb2.ConnectRequest] = asyncio.Queue()

    # both services

    async def Connect(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[control_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[control_pb2.ConnectResponse]:
        """Say everything that is queued; keep what is heard."""
        if self.refuses_streams is not None:
            await _refuse(context, self.refuses_streams)
        listening = asyncio.create_task(self._listen(request_iterator))
        try:
            while True:
                yield await self._to_say.get()
        finally:
            listening.cancel()

    async def _listen(self, requests: AsyncIterator[control_pb2.ConnectRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("step") != "heartbeat":
                self._heard.put_nowait(request)

    async def UploadArtifact(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[artifact_pb2.UploadArtifactRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[artifact_pb2.UploadArtifactResponse]:
        """Take any upload from its first byte on, unless a refusal is set."""
        header = (await anext(request_iterator)).header
        if self.refuses_uploads is not None:
            await _refuse(context, self.refuses_uploads)
        yield artifact_pb2.UploadArtifactResponse(resume_from=0)
        content = b"".join([request.part async for request in request_iterator])
        assert hashlib.sha256(content).digest() == header.sha256
        self.uploads.put_nowait(Received(header, content))
        yield artifact_pb2.UploadArtifactResponse(stored=artifact_pb2.UploadStored())

    async def DownloadArtifact(  # noqa: N802 - gRPC's name
        self,
        request: artifact_pb2.DownloadArtifactRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[artifact_pb2.DownloadArtifactResponse]:
        """Serve what was put into `blobs`."""
        content = self.blobs.get(request.sha256)
        if content is None:
            await _refuse(context, Refused(Reason.NOT_FOUND, "expected a digest that is served"))
            return
        header = artifact_pb2.DownloadHeader(size_bytes=len(content))
        yield artifact_pb2.DownloadArtifactResponse(header=header)
        if rest := content[request.offset :]:
            yield artifact_pb2.DownloadArtifactResponse(part=rest)

    # a test's side

    def say(self, **step: Any) -> None:
        """Queue a message for the agent."""
        self._to_say.put_nowait(control_pb2.ConnectResponse(**step))

    async def hear(self, step: str) -> control_pb2.ConnectRequest:
        """Return the agent's next message, which must be this step."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            message = await self._heard.get()
        assert message.WhichOneof("step") == step, message
        return message

    async def hear_refusal(self, about: str = "") -> Reason:
        """Return the reason with which the agent declines."""
        details = (await self.hear("refusal")).refusal.details
        assert about in details.subject
        return Reason(details.reason)

    async def uploaded(self) -> Received:
        """Return the agent's next upload."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.uploads.get()

    def serve(self, content: bytes) -> control_pb2.ArtifactReference:
        """Have these bytes for download."""
        digest = hashlib.sha256(content).digest()
        self.blobs[digest] = content
        return control_pb2.ArtifactReference(sha256=digest, size_bytes=len(content))

    def serve_plan(self, federation: Federation) -> None:
        """Have the federation's plan and its members for download."""
        for path in (federation.folder / "plan").iterdir():
            self.serve(path.read_bytes())


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], refused: Refused) -> None:
    code = RULES[refused.reason].code
    await context.abort(code, refused.subject, refusal_trailers(refused))


@asynccontextmanager
async def rogue_coordinator(federation: Federation) -> AsyncIterator[Rogue]:
    """Put a rogue in the coordinator's place."""
    await federation.stop()
    identity = load_server_identity(federation.home)
    server, found = grpc.aio.server(), Rogue()
    found.serve_plan(federation)
    control_pb2_grpc.add_ControlServiceServicer_to_server(found, server)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(found, server)
    pair = [(identity.private_key, identity.certificate)]
    credentials = grpc.ssl_server_credentials(pair, identity.authority, require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{federation.control_port}", credentials)
    await server.start()
    yield found
    await server.stop(None)


def invitation(
    federation: Federation, run_id: bytes, kind: Protection, **fields: Any
) -> control_pb2.Invitation:
    """Return an invitation that is in order, but for the key that `encrypted` needs."""
    plan = (federation.folder / "plan" / PLAN_FILE).read_bytes()
    reference = control_pb2.ArtifactReference(
        sha256=hashlib.sha256(plan).digest(), size_bytes=len(plan)
    )
    clip = PLAIN_CLIP if kind is Protection.PLAIN else 0.0
    values: dict[str, Any] = {
        "run_id": run_id,
        "round": 1,
        "rounds": 2,
        "plan": reference,
        "training": LocalTraining().to_message(),
        "encoding": Encoding(kind, clip=clip).to_message(),
        "release": control_pb2.Release.ValueType(Release.AGENTS),
        "minimum": 1,
        "evaluation": EvaluationTerms(Report.NONE).to_message(),
    }
    return control_pb2.Invitation(**(values | fields))


def key_of(key_id: int) -> crypto.RunKey:
    """Return the run key of this number, which these tests know."""
    return crypto.RunKey(key_id.to_bytes(32, "big"))


def envelope(identity: Identity, run_id: bytes, key_id: int) -> control_pb2.KeyEnvelope:
    """Wrap a run key for this device, as if it had made it itself."""
    name = identity.agent_id
    public = identity.exchange_key.public_key().public_bytes_raw()
    context = crypto.WrapContext(run_id, key_id, name, name)
    return control_pb2.KeyEnvelope(
        sender_id=name,
        sender_key=identity.advertised_exchange_key(),
        recipient_id=name,
        wrapped=crypto.wrap(key_of(key_id), identity.exchange_key, public, context),
        key_id=key_id,
    )


@dataclass(frozen=True)
class Sum:
    """The sum of one update under a key, for a round: what an honest coordinator would publish."""

    context: crypto.UpdateContext
    content: bytes
    opened: crypto.OpenedSum

    @property
    def fields(self) -> Mapping[str, Any]:
        """Fields of the round's outcome."""
        c = self.context
        return {"round": c.round, "attempt": c.attempt, "weight_cap": c.weight_cap, "slots": [0]}


def context_of(round_number: int, clip: float, attempt: int = 1) -> crypto.UpdateContext:
    """Return what the updates of a cohort of one are bound to."""
    capacity = Encoding(Protection.ENCRYPTED).capacity
    return crypto.UpdateContext(RUN, round_number, attempt, PARAMETERS, capacity, WEIGHT_CAP, clip)


def encrypted_sum(upload: bytes, context: crypto.UpdateContext, key_id: int) -> Sum:
    """Sum one encrypted update, and open the sum."""
    protection = crypto.protection("encrypted")
    total = protection.accumulator(context)
    total.add(0, io.BytesIO(upload))
    content = b"".join(total.result())
    opened = protection.open_sum(context, key_of(key_id), (0,), io.BytesIO(content))
    return Sum(context, content, opened)


def encrypted_update(update: Theta, context: crypto.UpdateContext, key_id: int) -> bytes:
    """Encrypt another agent's update."""
    rounding = np.random.default_rng(0)
    encoder = crypto.protection("encrypted").encoder(context, 0, key_of(key_id), rounding)
    return b"".join(encoder.encode(update, 1))
