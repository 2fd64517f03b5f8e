"""Certificate chains: whom a certificate names, and whether a pinned authority stands behind it.

A chain is DER, the agent's certificate first, then at most one issuer; the authority itself is
pinned and never part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from fedloom.errors import FedloomError

AGENT_ROLE = "agent"
OPERATOR_ROLE = "operator"
MAX_ISSUERS = 1
RENEWED_BELOW = 1 / 3  # of a certificate's lifetime left
MAX_CERTIFICATE_BYTES = 4096  # ours have about 600
# Devices without a clock of their own are hours wrong (time zones, no network time yet), and an
# agent must not take its peers for expired then. A stolen key is good for this much longer.
CLOCK_TOLERANCE = timedelta(days=1)


class UntrustedChain(FedloomError):
    """The pinned authority does not stand behind a certificate; `problem` says why."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True)
class Subject:
    """Who a certificate is for."""

    name: str
    role: str


def subject_of(certificate: x509.Certificate) -> Subject:
    """Return name and role; an attribute that is missing or stated twice reads as empty."""
    return Subject(
        _only(certificate, NameOID.COMMON_NAME),
        _only(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME),
    )


def verified_client(
    chain: Sequence[bytes], authority: x509.Certificate, now: datetime
) -> x509.Certificate:
    """Return the first certificate of a foreign chain once the authority stands behind it.

    Checked to RFC 5280: signatures, validity (with CLOCK_TOLERANCE), who may be an issuer, lengths
    of paths, and that the certificate is one for TLS clients. Who it names is the caller's
    question. Raises UntrustedChain.
    """
    if not 1 <= len(chain) <= 1 + MAX_ISSUERS:
        raise UntrustedChain(f"expected a certificate and at most {MAX_ISSUERS} issuer")
    if any(len(der) > MAX_CERTIFICATE_BYTES for der in chain):
        raise UntrustedChain(f"expected certificates of at most {MAX_CERTIFICATE_BYTES} bytes")
    try:
        leaf, *issuers = [x509.load_der_x509_certificate(der) for der in chain]
        verifier = (
            PolicyBuilder()
            .store(Store([authority]))
            .time(_within(leaf, now))
            .max_chain_depth(MAX_ISSUERS)
            .extension_policies(
                ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=_CLIENT_POLICY
            )
            .build_client_verifier()
        )
        verifier.verify(leaf, issuers)
    except (ValueError, VerificationError, x509.InvalidVersion) as error:
        raise UntrustedChain(f"expected a chain to our authority: {error}"[:200]) from error
    return leaf


def needs_renewal(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether less than a third of the certificate's lifetime is left."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return end - now < RENEWED_BELOW * (end - start)


def public_key_bytes(holder: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """Return the SubjectPublicKeyInfo (DER): what a key's fingerprint is the SHA-256 of."""
    return holder.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _within(leaf: x509.Certificate, now: datetime) -> datetime:
    """Return the moment of the certificate's validity that is nearest to now, if it is near."""
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if start - now > CLOCK_TOLERANCE or now - end > CLOCK_TOLERANCE:
        raise UntrustedChain(
            f"expected a certificate that is valid on {now:%Y-%m-%d}, found one of "
            f"{start:%Y-%m-%d} to {end:%Y-%m-%d}"
        )
    return min(max(now, start), end).astimezone(UTC)


def _only(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    return str(values[0].value) if len(values) == 1 else ""


def _signs_nothing(
    policy: Policy, certificate: x509.Certificate, found: x509.BasicConstraints
) -> None:
    if found.ca:
        raise ValueError("expected the certificate of a client, found an authority's")


def _for_clients(
    policy: Policy, certificate: x509.Certificate, found: x509.ExtendedKeyUsage
) -> None:
    if ExtendedKeyUsageOID.CLIENT_AUTH not in found:
        raise ValueError("expected a certificate for TLS clients")


# What RFC 5280 and the web ask of an end entity, but for the alternative name: ours are subjects.
_CLIENT_POLICY = (
    ExtensionPolicy.webpki_defaults_ee()
    .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    .require_present(x509.BasicConstraints, Criticality.CRITICAL, _signs_nothing)
    .require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _for_clients)
)
