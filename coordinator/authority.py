"""The federation's certificate authority: it names agents and the server, and nothing else.

ECDSA over P-256 throughout: the curve that every TLS stack verifies by default. An agent's
certificate says who it is (common name) and what it may do (organisational unit: its role).
"""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.errors import ConfigError, Reason, Refused
from fedloom.secret_files import write_secret

AGENT_ROLE = "agent"
AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
AGENT_DAYS = 365
MAX_REQUEST_BYTES = 4096
_BACKDATED = timedelta(minutes=10)  # devices' clocks are late

_NOT_A_REQUEST = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
)

_CERTIFICATE_FILE = "authority.pem"
_KEY_FILE = "authority.key"
_SERVER_CERTIFICATE_FILE = "server.pem"
_SERVER_KEY_FILE = "server.key"


@dataclass(frozen=True)
class ServerIdentity:
    """What the server shows to TLS peers, all PEM."""

    private_key: bytes
    certificate: bytes
    authority: bytes

    def __repr__(self) -> str:
        return "ServerIdentity(...)"


class Authority:
    """Issues certificates; the private key stays in its folder, mode 0600."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str]) -> "Authority":
        """Make the authority and a server certificate for `hosts` in a folder that has neither."""
        if (folder / _KEY_FILE).exists():
            raise ConfigError(str(folder), "has a coordinator already; choose another --home")
        names = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1", socket.gethostname()])
        alternatives = [_alternative(host) for host in names]
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Fedloom authority", "authority")
        builder = (
            _builder(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
        )
        authority = cls(builder.sign(key, hashes.SHA256()), key)
        _write(folder, _CERTIFICATE_FILE, _KEY_FILE, authority.certificate, key)
        authority._issue_server(folder, alternatives)
        return authority

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Read the authority of a folder."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / _CERTIFICATE_FILE).read_bytes())
            key = serialization.load_pem_private_key((folder / _KEY_FILE).read_bytes(), None)
        except (OSError, ValueError) as error:
            raise ConfigError(
                str(folder), f"expected a coordinator's folder: run `init` first ({error})"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(str(folder / _KEY_FILE), "expected an ECDSA key")
        return cls(certificate, key)

    @property
    def certificate_der(self) -> bytes:
        """The authority's certificate as tokens carry it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def issue_agent(self, request: x509.CertificateSigningRequest, agent_id: str) -> bytes:
        """Return a client certificate (DER) for the key of a parsed request."""
        builder = (
            _builder(
                _name(agent_id, AGENT_ROLE),
                self.certificate.subject,
                request.public_key(),
                self._key.public_key(),
                AGENT_DAYS,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.DER)

    def _issue_server(self, folder: Path, names: Sequence[x509.GeneralName]) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(
                _name("Fedloom coordinator", "coordinator"),
                self.certificate.subject,
                key.public_key(),
                self._key.public_key(),
                SERVER_DAYS,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        _write(folder, _SERVER_CERTIFICATE_FILE, _SERVER_KEY_FILE, certificate, key)


def load_server_identity(folder: Path) -> ServerIdentity:
    """Read what the server shows to its peers."""
    return ServerIdentity(
        (folder / _SERVER_KEY_FILE).read_bytes(),
        (folder / _SERVER_CERTIFICATE_FILE).read_bytes(),
        (folder / _CERTIFICATE_FILE).read_bytes(),
    )


def parse_certificate_request(data: bytes) -> x509.CertificateSigningRequest:
    """Validate a foreign signing request; raises Refused(MALFORMED)."""
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


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    # Both identifiers: strict verifiers (RFC 5280, sections 4.2.1.1 and 4.2.1.2) ask for them.
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(subject_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _name(common_name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError(host, "expected an IP address or a host name in ASCII") from error


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


def _write(
    folder: Path,
    certificate_file: str,
    key_file: str,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
) -> None:
    (folder / certificate_file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_secret(folder / key_file, pem)
