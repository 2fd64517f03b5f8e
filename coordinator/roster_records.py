"""What the roster hands out, as frozen values, and how they are read from its tables."""

from dataclasses import dataclass
from datetime import UTC
from enum import Enum

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import serialization

Row = sa.Row[tuple[object, ...]]


@dataclass(frozen=True)
class Invitation:
    """What an operator handed out; times in seconds since 1970."""

    id: str
    name: str
    expires_at: float
    uses: int
    used: int
    revoked_at: float | None


@dataclass(frozen=True)
class AgentRecord:
    """An enrolled agent; times in seconds since 1970."""

    agent_id: str
    enrolled_at: float
    certificate_until: float
    banned_at: float | None
    ban_reason: str | None
    last_seen: float | None


@dataclass(frozen=True)
class CertificateRequest:
    """A key that asks for a certificate in an agent's name."""

    agent_id: str
    public_key_sha256: bytes
    request: bytes  # PKCS #10, DER
    former_key_signature: bytes = b""  # of a renewal with a new key
    chain: tuple[bytes, ...] = ()  # DER, leaf first; empty until it is signed


class Grant(Enum):
    """What a signed certificate did."""

    ENROLLED = "the key is the agent's"
    RENEWED = "the key may take the place of the agent's"


def request_of(row: Row) -> CertificateRequest:
    """Read a row of certificate_requests."""
    links = [] if row.chain is None else x509.load_pem_x509_certificates(row.chain)
    return CertificateRequest(
        row.agent_id,
        row.public_key_sha256,
        row.request,
        row.former_key_signature,
        tuple(link.public_bytes(serialization.Encoding.DER) for link in links),
    )


def invitation_id_of(secret_sha256: bytes) -> str:
    """Return the name by which operators know an invitation."""
    return secret_sha256.hex()[:8]


def invitation_of(row: Row) -> Invitation:
    """Read a row of invitations."""
    return Invitation(
        invitation_id_of(row.secret_sha256),
        row.name,
        row.expires_at,
        row.uses,
        row.used,
        row.revoked_at,
    )


def record_of(row: Row) -> AgentRecord:
    """Read a row of agents."""
    return AgentRecord(
        row.agent_id,
        row.enrolled_at,
        row.certificate_until,
        row.banned_at,
        row.ban_reason,
        row.last_seen,
    )


def end_of(chain: tuple[bytes, ...]) -> float:
    """Return when a chain's certificate ends, in seconds since 1970."""
    certificate = x509.load_der_x509_certificate(chain[0])
    return certificate.not_valid_after_utc.astimezone(UTC).timestamp()
