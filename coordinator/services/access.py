"""Who may call what: one table, one interceptor, and the identity that a call comes with.

A service is not asked: the interceptor refuses before it is entered. What is not in the table is
refused to everybody.
"""

import contextlib
import hashlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from typing import Any

import grpc
import structlog
from cryptography import x509

from coordinator.faults import StorageFault, is_full
from coordinator.roster import Roster
from fedloom.chains import AGENT_ROLE, OPERATOR_ROLE, public_key_bytes, subject_of
from fedloom.errors import RULES, Reason, Refused, refusal_trailers

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any  # grpc.RpcMethodHandler, which is generic in its stubs alone
_log = structlog.get_logger()


class Role(Enum):
    """What a caller proved to be."""

    ANYONE = "anyone"
    AGENT = AGENT_ROLE  # enrolled, and not banned
    OPERATOR = OPERATOR_ROLE  # a certificate of that role, or the coordinator's own user


REQUIRED_ROLE = {
    "/fedloom.v1.EnrolmentService/Enrol": Role.ANYONE,
    "/fedloom.v1.EnrolmentService/Renew": Role.AGENT,
    "/fedloom.v1.ControlService/Connect": Role.AGENT,
    "/fedloom.v1.ArtifactService/UploadArtifact": Role.AGENT,
    "/fedloom.v1.ArtifactService/DownloadArtifact": Role.AGENT,
    "/fedloom.v1.AdminService/StartRun": Role.OPERATOR,
    "/fedloom.v1.AdminService/ListRuns": Role.OPERATOR,
    "/fedloom.v1.AdminService/WatchRun": Role.OPERATOR,
    "/fedloom.v1.AdminService/PauseRun": Role.OPERATOR,
    "/fedloom.v1.AdminService/ResumeRun": Role.OPERATOR,
    "/fedloom.v1.AdminService/CancelRun": Role.OPERATOR,
    "/fedloom.v1.AdminService/GetRunPrivacy": Role.OPERATOR,
    "/fedloom.v1.AdminService/ExportRun": Role.OPERATOR,
    "/fedloom.v1.AdminService/Invite": Role.OPERATOR,
    "/fedloom.v1.AdminService/ListInvitations": Role.OPERATOR,
    "/fedloom.v1.AdminService/RevokeInvitation": Role.OPERATOR,
    "/fedloom.v1.AdminService/ListAgents": Role.OPERATOR,
    "/fedloom.v1.AdminService/GetAgent": Role.OPERATOR,
    "/fedloom.v1.AdminService/BanAgent": Role.OPERATOR,
    "/fedloom.v1.AdminService/UnbanAgent": Role.OPERATOR,
    "/fedloom.v1.AdminService/ListPlans": Role.OPERATOR,
    "/fedloom.v1.AdminService/GetPlan": Role.OPERATOR,
    "/grpc.health.v1.Health/Check": Role.ANYONE,  # a load balancer has no certificate of ours
    "/grpc.health.v1.Health/Watch": Role.ANYONE,
}


METHODS = 2 * len(REQUIRED_ROLE)  # whose handlers are kept as they were wrapped


@dataclass(frozen=True)
class Peer:
    """What a verified client certificate says."""

    name: str
    role: str
    public_key_sha256: bytes
    certificate: x509.Certificate

    @property
    def until(self) -> datetime:
        """When the certificate ends."""
        return self.certificate.not_valid_after_utc


def peer_of(context: _Context) -> Peer | None:
    """Return who calls, as TLS has verified it; None without a client certificate."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    return None if pem is None else _read_certificate(pem)


def calling_peer(context: _Context) -> Peer:
    """Return who calls an RPC that the table gives to holders of a certificate."""
    peer = peer_of(context)
    if peer is None:
        raise AssertionError("the interceptor lets nobody in here without a certificate")
    return peer


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call that the table does not allow its caller."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._guarded = lru_cache(METHODS)(self._guard)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Return the RPC's handler behind a check of its caller."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guarded(handler, handler_call_details.method)

    def _guard(self, handler: _Handler, rpc: str) -> _Handler:
        async def admit(context: _Context) -> None:
            async with refusing(context, rpc):
                self._admit(rpc, context)

        return _guarded(handler, admit)

    def _admit(self, rpc: str, context: _Context) -> None:
        required = REQUIRED_ROLE.get(rpc)
        if required is Role.ANYONE:
            return
        # A unix socket has no TLS: that the file's mode lets nobody else connect is its proof.
        if required is Role.OPERATOR and context.peer().startswith("unix:"):
            return
        peer = peer_of(context)
        if required is None or peer is None or peer.role != required.value:
            wanted = "no caller" if required is None else f"a certificate of role {required.value}"
            found = "none" if peer is None else f"role {peer.role[:64]!r}"
            raise Refused(Reason.NOT_PERMITTED, f"expected {wanted}, found {found}")
        if peer.until < datetime.now(UTC):  # since the connection was made
            raise Refused(Reason.CERTIFICATE_EXPIRED, f"the certificate ended on {peer.until}")
        if required is Role.AGENT:
            self._roster.require_member(peer.name, peer.public_key_sha256)


@lru_cache(maxsize=16_384)
def _read_certificate(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    subject = subject_of(certificate)
    return Peer(subject.name, subject.role, public_key_sha256(certificate), certificate)


def public_key_sha256(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """Return the digest by which the roster knows a key."""
    return hashlib.sha256(public_key_bytes(holder)).digest()


@asynccontextmanager
async def refusing(context: _Context, rpc: str) -> AsyncIterator[None]:
    """End the RPC with the refusal that the body raises; a fault of ours tells no details."""
    try:
        yield
    except Refused as refused:
        if refused.reason is not Reason.BUSY:  # limits.py says those, not one by one
            _log.info("rpc refused", rpc=rpc, reason=refused.reason.name, subject=refused.subject)
        ending = refused
    except Exception as error:  # the top of an RPC: gRPC would tell the peer the error's text
        ending = _fault(error, rpc)
    else:
        return
    await context.abort(RULES[ending.reason].code, ending.reason.name, refusal_trailers(ending))


def _fault(error: Exception, rpc: str) -> Refused:
    """Say in the log what failed, and to the peer that it was not the peer."""
    if isinstance(error, OSError) and is_full(error):
        _log.error("no room to store", rpc=rpc, problem=str(error))
        return Refused(Reason.STORAGE_FULL, "the coordinator has no room to store this")
    if isinstance(error, StorageFault):
        _log.error("storage failed", rpc=rpc, problem=str(error))
        return Refused(Reason.INTERNAL, "the coordinator's storage fails: its log says how")
    _log.exception("rpc failed", rpc=rpc)
    return Refused(Reason.INTERNAL, "the coordinator failed on this call")


def _guarded(handler: _Handler, admit: Callable[[_Context], Awaitable[None]]) -> _Handler:
    """Return the handler with `admit` before it, whatever its kind."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    attribute, make = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    behaviour = getattr(handler, attribute)

    async def answer(request: Any, context: _Context) -> Any:
        await admit(context)
        return await behaviour(request, context)

    async def answers(request: Any, context: _Context) -> AsyncIterator[Any]:
        await admit(context)
        async with contextlib.aclosing(behaviour(request, context)) as messages:
            async for message in messages:
                yield message

    guarded = answers if inspect.isasyncgenfunction(behaviour) else answer
    return make(guarded, handler.request_deserializer, handler.response_serializer)
