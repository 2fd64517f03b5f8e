"""Who may call what: one table, and the identity that a call comes with."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from coordinator.authority import AGENT_ROLE
from coordinator.store import Store
from fedloom.errors import RULES, Reason, Refused, refusal_trailers

_log = structlog.get_logger()


class Role(Enum):
    """What a caller proved to be."""

    ANYONE = "anyone"
    AGENT = "agent"


REQUIRED_ROLE = {
    "/fedloom.v1.EnrolmentService/Enrol": Role.ANYONE,
    "/fedloom.v1.ControlService/Connect": Role.AGENT,
    "/fedloom.v1.ArtifactService/UploadArtifact": Role.AGENT,
    "/fedloom.v1.ArtifactService/DownloadArtifact": Role.AGENT,
}


@dataclass(frozen=True)
class Peer:
    """The subject of a verified client certificate."""

    agent_id: str
    role: str
    public_key_sha256: bytes


def require_agent(context: grpc.aio.ServicerContext[Any, Any], store: Store) -> str:
    """Return the name of the enrolled agent that calls; raises Refused(NOT_PERMITTED).

    TLS has verified the certificate against our authority; here it must also be the one that the
    agent enrolled with last, so that a device that enrols again shuts its old key out.
    """
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    peer = None if pem is None else _read_certificate(pem)
    if peer is None or peer.role != AGENT_ROLE:
        raise Refused(Reason.NOT_PERMITTED, "expected an agent's client certificate")
    if store.agent_key(peer.agent_id) != peer.public_key_sha256:
        raise Refused(Reason.NOT_PERMITTED, "expected the certificate of this agent's enrolment")
    return peer.agent_id


@lru_cache(maxsize=16_384)
def _read_certificate(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    return Peer(
        _attribute(certificate, NameOID.COMMON_NAME),
        _attribute(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME),
        public_key_sha256(certificate),
    )


def _attribute(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    return str(values[0].value) if values else ""


def public_key_sha256(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """Return the digest by which the store knows a key."""
    der = holder.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).digest()


@asynccontextmanager
async def refusing(context: grpc.aio.ServicerContext[Any, Any], rpc: str) -> AsyncIterator[None]:
    """End the RPC with the refusal that the body raises; a fault of ours tells no details."""
    try:
        yield
    except Refused as refused:
        if refused.reason is not Reason.BUSY:  # limits.py says those, not one by one
            _log.info("rpc refused", rpc=rpc, reason=refused.reason.name, subject=refused.subject)
        ending = refused
    except Exception:  # the top of an RPC: gRPC would tell the peer the error's text
        _log.exception("rpc failed", rpc=rpc)
        ending = Refused(Reason.INTERNAL, "the coordinator failed on this call")
    else:
        return
    await context.abort(RULES[ending.reason].code, ending.reason.name, refusal_trailers(ending))
