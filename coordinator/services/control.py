"""ControlService: one stream per agent, turned into events of the run."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration

from coordinator.events import Applied, Declined, Evaluation, KeyShared, Ready
from coordinator.roster import Roster
from coordinator.services.access import Peer, calling_peer, refusing
from coordinator.services.limits import Admission, Pace
from coordinator.services.traits import traits_of
from coordinator.services.turns import OneByOne
from coordinator.sessions import Session, Sessions
from fedloom.chains import MAX_CERTIFICATE_BYTES, MAX_ISSUERS
from fedloom.errors import Reason, Refused, refused_from_details
from fedloom.quality import Quality
from fedloom.terms import MAX_CAPACITY, MAX_WEIGHT_CLASS, Protection
from fedloom.v1 import control_pb2, control_pb2_grpc
from fedloom.version import OLDEST_SERVED_PROTOCOL, PROTOCOL_VERSION

HELLO_SECONDS = 20.0
HEARTBEAT_SECONDS = 15
STANDING_SECONDS = 60.0  # how late a ban may reach an open stream, and how exact `last_seen` is
MAX_ENVELOPE_BYTES = 16_384
MAX_UNFINISHED_RUNS = 16
MAX_COUNT = 1 << 62
AgentEvent = KeyShared | Ready | Applied | Declined
_log = structlog.get_logger()


class Conversation(Protocol):
    """What listens to agents; everything it hears has been validated.

    An agent's next message is read when the one before was heard to its end.
    """

    async def heard(self, run_id: bytes, event: AgentEvent) -> None:
        """An agent's step in a run."""

    async def heard_mask_step(self, agent: str, run_id: bytes, message: bytes) -> None:
        """A member's message in its cohort's protocol for masks; not validated yet."""

    def heard_progress(self, agent: str, run_id: bytes, round_number: int, share: float) -> None:
        """An agent is alive; `share` of its local training is done."""


class Membership:
    """An agent's standing, looked up again while it talks: a ban ends its open stream too."""

    def __init__(self, roster: Roster, peer: Peer) -> None:
        self.agent_id = peer.name
        self._roster = roster
        self._key = peer.public_key_sha256
        self._looked_at = -math.inf
        self.check()

    def check(self) -> None:
        """Raise Refused (BANNED, NOT_PERMITTED) when the agent is out by now."""
        if time.monotonic() - self._looked_at < STANDING_SECONDS:
            return
        self._looked_at = time.monotonic()
        self._roster.require_member(self.agent_id, self._key)
        self._roster.seen(self.agent_id, time.time())


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Keeps an agent's stream open and hands its messages on."""

    def __init__(
        self, sessions: Sessions, roster: Roster, conversation: Conversation, admission: Admission
    ) -> None:
        self._sessions = sessions
        self._roster = roster
        self._conversation = conversation
        self._admission = admission
        # Of a thousand messages that come at once, or go, the loop would handle all before it looks
        # at anything else: a second.
        self._hearing = OneByOne()
        self._telling = OneByOne()

    async def Connect(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[control_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[control_pb2.ConnectResponse]:
        """Admit the agent, then read and write until either side ends."""
        async with refusing(context, "Connect"), self._admission.call(context.peer()) as call:
            membership = Membership(self._roster, calling_peer(context))
            agent_id = membership.agent_id
            pace = await call.stream(agent_id)
            session = _session(agent_id, await _first(request_iterator))
            yield control_pb2.ConnectResponse(
                welcome=control_pb2.Welcome(
                    protocol_version=PROTOCOL_VERSION,
                    heartbeat_interval=Duration(seconds=HEARTBEAT_SECONDS),
                )
            )
            self._sessions.open(session)
            _log.info("agent connected", agent=agent_id)
            reader = asyncio.create_task(self._read(session, membership, pace, request_iterator))
            try:
                while not isinstance(message := await session.outbox.get(), Refused):
                    async with self._telling:
                        pass  # a turn to begin: how long the agent takes to read is its own affair
                    yield message
                if message is not _END:
                    raise message
            finally:
                reader.cancel()
                self._sessions.close(session)
                _log.info("agent disconnected", agent=agent_id)

    async def _read(
        self,
        session: Session,
        membership: Membership,
        pace: Pace,
        requests: AsyncIterator[control_pb2.ConnectRequest],
    ) -> None:
        ending: Refused = _END
        try:
            async for request in requests:
                await pace.next()
                async with self._hearing:
                    membership.check()
                # Outside: what is done in a thread keeps nobody else waiting.
                await self._dispatch(session.agent_id, request)
        except Refused as refused:
            ending = refused
        except Exception:
            # The top of the agent's messages: a bug of ours ends this stream, not the coordinator.
            _log.exception("message failed", agent=session.agent_id)
            ending = Refused(Reason.INTERNAL, "the coordinator failed on this message")
        with contextlib.suppress(asyncio.QueueFull):
            session.outbox.put_nowait(ending)

    async def _dispatch(self, agent: str, request: control_pb2.ConnectRequest) -> None:
        match request.WhichOneof("step"):
            case "heartbeat":
                beat = request.heartbeat
                _require(0 <= beat.progress <= 1, "progress in 0..1")
                self._conversation.heard_progress(agent, beat.run_id, beat.round, beat.progress)
            case "wrapped_key":
                await self._conversation.heard(
                    request.wrapped_key.run_id, _key_shared(agent, request)
                )
            case "ready":
                await self._conversation.heard(request.ready.run_id, _ready(agent, request.ready))
            case "applied":
                await self._conversation.heard(
                    request.applied.run_id, _applied(agent, request.applied)
                )
            case "mask_step":
                step = request.mask_step
                await self._conversation.heard_mask_step(agent, step.run_id, step.message)
            case "refusal":
                message = request.refusal
                refused = refused_from_details(message.details)
                _log.info(
                    "agent declined",
                    agent=agent,
                    reason=refused.reason.name,
                    subject=refused.subject,
                )
                await self._conversation.heard(
                    message.run_id, Declined(agent, message.round, refused.reason)
                )
            case "hello":
                raise Refused(Reason.MALFORMED, "expected one hello, found a second")
            case None:
                _log.info("unknown step ignored", agent=agent)  # a newer agent's


_END = Refused(Reason.INTERNAL, "the agent ended the stream")  # never sent: marks the queue's end


async def _first(requests: AsyncIterator[control_pb2.ConnectRequest]) -> control_pb2.Hello:
    try:
        request = await asyncio.wait_for(anext(requests), HELLO_SECONDS)
    except (TimeoutError, StopAsyncIteration):
        raise Refused(Reason.MALFORMED, f"expected a hello within {HELLO_SECONDS} s") from None
    if request.WhichOneof("step") != "hello":
        raise Refused(Reason.MALFORMED, f"expected hello first, found {request.WhichOneof('step')}")
    return request.hello


def _session(agent_id: str, hello: control_pb2.Hello) -> Session:
    if not OLDEST_SERVED_PROTOCOL <= hello.protocol_version <= PROTOCOL_VERSION:
        raise Refused(
            Reason.PROTOCOL_UNSUPPORTED,
            f"expected protocol {OLDEST_SERVED_PROTOCOL}..{PROTOCOL_VERSION}, "
            f"found {hello.protocol_version}",
        )
    known = {protection.value for protection in Protection}
    key = hello.exchange_key if hello.HasField("exchange_key") else None
    if key is not None and not (len(key.public_key) == 32 and _small(key)):
        raise Refused(Reason.MALFORMED, "expected a 32-byte X25519 key with its certificate")
    unfinished = tuple(hello.unfinished_run_ids)
    if len(unfinished) > MAX_UNFINISHED_RUNS or any(len(run_id) != 16 for run_id in unfinished):
        raise Refused(Reason.MALFORMED, f"expected at most {MAX_UNFINISHED_RUNS} run ids")
    protections = frozenset(Protection(p) for p in hello.protections if p in known)
    traits = traits_of(hello, time.time())
    return Session(agent_id, protections, key, unfinished, traits)


def _small(key: control_pb2.ExchangeKey | control_pb2.IdentityKey) -> bool:
    parts = (key.signature, key.certificate, *key.issuers)
    return len(key.issuers) <= MAX_ISSUERS and max(map(len, parts)) <= MAX_CERTIFICATE_BYTES


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {expected}")


def _key_shared(agent: str, request: control_pb2.ConnectRequest) -> KeyShared:
    message = request.wrapped_key
    _require(len(message.envelopes) <= MAX_CAPACITY, f"at most {MAX_CAPACITY} envelopes")
    envelopes = {e.recipient_id: e.SerializeToString() for e in message.envelopes}
    _require(all(len(e) <= MAX_ENVELOPE_BYTES for e in envelopes.values()), "small envelopes")
    return KeyShared(agent, message.key_id, envelopes)


def _ready(agent: str, message: control_pb2.Ready) -> Ready:
    _require(message.weight_class <= MAX_WEIGHT_CLASS, f"a weight class up to {MAX_WEIGHT_CLASS}")
    loss = message.training_loss if message.HasField("training_loss") else None
    _require(loss is None or math.isfinite(loss), "a finite training loss")
    seconds = message.training_time.ToTimedelta().total_seconds()
    identity = message.identity
    _require(_small(identity), "an identity with a certificate")
    return Ready(
        agent,
        message.round,
        message.weight_class,
        loss,
        seconds,
        message.advertisement,
        identity.SerializeToString(),
        message.base_rounds,
    )


def _applied(agent: str, message: control_pb2.Applied) -> Applied:
    _require(len(message.state_sha256) == 32, "a SHA-256 of 32 bytes")
    _require(message.saturated < MAX_COUNT, "a count below 2^62")
    evaluation = None
    if message.HasField("evaluation"):
        found = message.evaluation
        _require(1 <= found.count < MAX_COUNT, "a count in 1..2^62")
        _require(found.correct <= found.count, "at most `count` correct rows")
        _require(math.isfinite(found.loss), "a finite loss")
        evaluation = Evaluation(found.count, found.correct, found.loss)
    clip = message.next_clip
    _require(clip == 0 or 1e-20 <= clip <= 1e20, "a clip of 1e-20..1e20")
    _require(len(message.opened_sha256) in (0, 32), "a SHA-256 of 32 bytes")
    return Applied(
        agent,
        message.round,
        message.state_sha256,
        evaluation,
        message.saturated,
        clip,
        message.opened_sha256,
        Quality.from_message(message.quality) if message.HasField("quality") else None,
    )
