"""Certificates as the authority issues them: for whom, for how long, and what they may do.

ECDSA over P-256 throughout: the curve that every TLS stack verifies by default. A certificate says
who its holder is (common name) and what it may do (organisational unit: its role).
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.chains import AGENT_ROLE, CLOCK_TOLERANCE, OPERATOR_ROLE
from fedloom.errors import ConfigError, Reason, Refused

ROOT_DAYS = 3650  # devices pin it: with another root every device joins again
ISSUING_DAYS = 730  # a visit to the root every other year; no agent's certificate outlives it
SERVER_DAYS = 825  # the longest that TLS stacks of phones accept
AGENT_DAYS = 365  # renewed after two thirds: a device may be off for four months
OPERATOR_DAYS = 365  # there is no renewal: an operator asks for another one
MAX_REQUEST_BYTES = 4096

_NOT_A_REQUEST = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
)


@dataclass(frozen=True)
class Issuer:
    """A key that signs certificates, and the certificate that says so."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def new_root(cls, path_length: int) -> "Issuer":
        """Make a root; with path length 0 it can never have an issuing certificate below it."""
        key = new_key()
        name = _name("Fedloom authority", "authority")
        builder = _authority(_builder(name, name, key.public_key(), key), path_length)
        end = datetime.now(UTC) + timedelta(days=ROOT_DAYS)
        return cls(builder.not_valid_after(end).sign(key, hashes.SHA256()), key)

    def issuing(self, key: CertificatePublicKeyTypes) -> x509.Certificate:
        """Return a certificate with which its holder issues to agents and operators."""
        name = _name("Fedloom issuing authority", "authority")
        return self._signed(_authority(self._below(name, key, ISSUING_DAYS), 0))

    def server(
        self, key: CertificatePublicKeyTypes, names: Sequence[x509.GeneralName]
    ) -> x509.Certificate:
        """Return a certificate for the coordinator's TLS ports."""
        name = _name("Fedloom coordinator", "coordinator")
        builder = self._below(name, key, SERVER_DAYS).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        return self._signed(_end_entity(builder, ExtendedKeyUsageOID.SERVER_AUTH))

    def agent(self, key: CertificatePublicKeyTypes, agent_id: str) -> x509.Certificate:
        """Return a certificate for a device."""
        builder = self._below(_name(agent_id, AGENT_ROLE), key, AGENT_DAYS)
        return self._signed(_end_entity(builder, ExtendedKeyUsageOID.CLIENT_AUTH))

    def operator(self, key: CertificatePublicKeyTypes, name: str) -> x509.Certificate:
        """Return a certificate for a person who operates the coordinator."""
        builder = self._below(_name(name, OPERATOR_ROLE), key, OPERATOR_DAYS)
        return self._signed(_end_entity(builder, ExtendedKeyUsageOID.CLIENT_AUTH))

    def _below(
        self, subject: x509.Name, key: CertificatePublicKeyTypes, days: int
    ) -> x509.CertificateBuilder:
        builder = _builder(subject, self.certificate.subject, key, self.key)
        end = datetime.now(UTC) + timedelta(days=days)
        return builder.not_valid_after(min(end, self.certificate.not_valid_after_utc))

    def _signed(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self.key, hashes.SHA256())


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a key of the one kind that is used here."""
    return ec.generate_private_key(ec.SECP256R1())


def request_for(
    key: ec.EllipticCurvePrivateKey, names: Sequence[x509.GeneralName] = ()
) -> x509.CertificateSigningRequest:
    """Return a signing request; the authority chooses the subject."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256())


def parse_certificate_request(data: bytes) -> x509.CertificateSigningRequest:
    """Validate a foreign signing request (DER); raises Refused(MALFORMED)."""
    if len(data) > MAX_REQUEST_BYTES:
        raise Refused(
            Reason.MALFORMED, f"expected at most {MAX_REQUEST_BYTES} bytes, found {len(data)}"
        )
    try:
        request = x509.load_der_x509_csr(data)
        signed = request.is_signature_valid
        key = request.public_key()
    except _NOT_A_REQUEST as error:
        raise Refused(Reason.MALFORMED, "expected a DER certificate signing request") from error
    p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    if not signed or not p256:
        raise Refused(Reason.MALFORMED, "expected a request signed by its own P-256 key")
    return request


def alternative_name(host: str) -> x509.GeneralName:
    """Return a host name or IP address as a certificate states it; raises ConfigError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError(host, "expected an IP address or a host name in ASCII") from error


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the key as a file holds it: not encrypted, so the file must be mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    # Both identifiers: strict verifiers (RFC 5280, sections 4.2.1.1 and 4.2.1.2) ask for them.
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    # TLS has no tolerance for a clock that is late.
    start = datetime.now(UTC) - CLOCK_TOLERANCE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .add_extension(subject_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _authority(builder: x509.CertificateBuilder, path_length: int) -> x509.CertificateBuilder:
    return builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=path_length), critical=True
    ).add_extension(_key_usage(signs_certificates=True), critical=True)


def _end_entity(
    builder: x509.CertificateBuilder, usage: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )


def _name(common_name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
