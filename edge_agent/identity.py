"""Who this device is: its keys, its certificate, and the authority that it pinned on joining.

`agent.pem` holds the TLS key and its certificate together, so that a renewal replaces both at once.
`request.key` is the key that a certificate is being asked for; it is there while a request is open.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto import generate_exchange_key
from fedloom.certified_keys import (
    EXCHANGE_KEY,
    IDENTITY_KEY,
    CertifiedKey,
    certify,
    check_certified,
)
from fedloom.chains import (
    AGENT_ROLE,
    UntrustedChain,
    public_key_bytes,
    subject_of,
    verified_client,
)
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.secret_files import make_private_folder, write_secret
from fedloom.v1 import control_pb2

_AGENT_FILE = "agent.pem"
_REQUEST_KEY_FILE = "request.key"
_AUTHORITY_FILE = "authority.pem"
_EXCHANGE_KEY_FILE = "exchange.key"
_IDENTITY_KEY_FILE = "identity.key"
_ADDRESS_FILE = "coordinator.address"
_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER


@dataclass(frozen=True)
class Identity:
    """A device that has joined a federation."""

    agent_id: str
    control_address: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate = field(repr=False)
    authority: x509.Certificate = field(repr=False)
    exchange_key: X25519PrivateKey = field(repr=False)
    identity_key: Ed25519PrivateKey = field(repr=False)
    issuers: tuple[x509.Certificate, ...] = field(default=(), repr=False)  # up to the authority

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return mutual TLS credentials that trust the pinned authority only."""
        chain = b"".join(link.public_bytes(_PEM) for link in (self.certificate, *self.issuers))
        return grpc.ssl_channel_credentials(
            self.authority.public_bytes(_PEM), _key_pem(self.key), chain
        )

    def require_valid(self, now: datetime) -> None:
        """Raise Refused(CERTIFICATE_EXPIRED) for what TLS would refuse without telling us."""
        end = self.certificate.not_valid_after_utc
        if now > end:
            raise Refused(
                Reason.CERTIFICATE_EXPIRED,
                f"this device's certificate ended on {end:%Y-%m-%d}, and its clock says "
                f"{now:%Y-%m-%d}: set the clock, or join again with a new token",
            )

    def advertised_exchange_key(self) -> control_pb2.ExchangeKey:
        """Return this device's X25519 key, certified."""
        public = self.exchange_key.public_key().public_bytes_raw()
        return control_pb2.ExchangeKey(
            public_key=public,
            signature=certify(EXCHANGE_KEY, self.agent_id, public, self.key),
            certificate=self.certificate.public_bytes(_DER),
            issuers=[link.public_bytes(_DER) for link in self.issuers],
        )

    def advertised_identity_key(self) -> control_pb2.IdentityKey:
        """Return this device's Ed25519 key, certified."""
        public = self.identity_key.public_key().public_bytes_raw()
        return control_pb2.IdentityKey(
            public_key=public,
            signature=certify(IDENTITY_KEY, self.agent_id, public, self.key),
            certificate=self.certificate.public_bytes(_DER),
            issuers=[link.public_bytes(_DER) for link in self.issuers],
        )

    def verified_exchange_key(self, agent_id: str, key: control_pb2.ExchangeKey) -> bytes:
        """Return another agent's X25519 key once it is certified; raises KEY_UNAVAILABLE."""
        return self._verified(EXCHANGE_KEY, agent_id, key)

    def verified_identity_key(self, agent_id: str, key: control_pb2.IdentityKey) -> bytes:
        """Return another agent's Ed25519 key once it is certified; raises KEY_UNAVAILABLE."""
        return self._verified(IDENTITY_KEY, agent_id, key)

    def _verified(
        self, label: bytes, agent_id: str, key: control_pb2.ExchangeKey | control_pb2.IdentityKey
    ) -> bytes:
        found = CertifiedKey.of(key)
        check_certified(label, agent_id, found, self.authority, datetime.now(UTC))
        return found.public_key


def request_key(home: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key to ask a certificate for, kept until there is one: a repeat asks the same."""
    make_private_folder(home)
    path = home / _REQUEST_KEY_FILE
    if path.exists():
        return _load_key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, _key_pem(key))
    return key


def joining_key(home: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key to join with: of an open request, or the one that this device is known by."""
    known = home / _AGENT_FILE
    if known.exists() and not (home / _REQUEST_KEY_FILE).exists():
        return _load_key(known)
    return request_key(home)


def certificate_request(key: ec.EllipticCurvePrivateKey) -> x509.CertificateSigningRequest:
    """Return a signing request for the key; the coordinator chooses the name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256())


def save_membership(
    home: Path,
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[bytes],
    authority: x509.Certificate,
    control_address: str,
) -> Identity:
    """Keep what enrolment gave, after checking that it fits our key and the token's authority."""
    _require_ours(chain, key, authority)
    write_secret(home / _AUTHORITY_FILE, authority.public_bytes(_PEM))
    if not (home / _EXCHANGE_KEY_FILE).exists():
        write_secret(home / _EXCHANGE_KEY_FILE, generate_exchange_key().private_bytes_raw())
    if not (home / _IDENTITY_KEY_FILE).exists():
        write_secret(home / _IDENTITY_KEY_FILE, Ed25519PrivateKey.generate().private_bytes_raw())
    write_secret(home / _ADDRESS_FILE, f"{control_address}\n".encode())
    _save_certificate(home, key, chain)
    return load_identity(home)


def save_renewal(
    home: Path, identity: Identity, key: ec.EllipticCurvePrivateKey, chain: Sequence[bytes]
) -> Identity:
    """Keep a newer certificate, after checking that it is for the same agent and for our key."""
    if _require_ours(chain, key, identity.authority) != identity.agent_id:
        raise Refused(Reason.NOT_PERMITTED, f"expected a certificate for {identity.agent_id}")
    _save_certificate(home, key, chain)
    return load_identity(home)


def _save_certificate(home: Path, key: ec.EllipticCurvePrivateKey, chain: Sequence[bytes]) -> None:
    """Replace key and certificate, both at once; the request is over then."""
    links = [x509.load_der_x509_certificate(der).public_bytes(_PEM) for der in chain]
    write_secret(home / _AGENT_FILE, _key_pem(key) + b"".join(links))
    (home / _REQUEST_KEY_FILE).unlink(missing_ok=True)


def load_identity(home: Path) -> Identity:
    """Read the device's identity; raises ConfigError that says to join first."""
    try:
        certificate, *issuers = x509.load_pem_x509_certificates((home / _AGENT_FILE).read_bytes())
        authority = x509.load_pem_x509_certificate((home / _AUTHORITY_FILE).read_bytes())
        exchange = X25519PrivateKey.from_private_bytes((home / _EXCHANGE_KEY_FILE).read_bytes())
        signing = Ed25519PrivateKey.from_private_bytes((home / _IDENTITY_KEY_FILE).read_bytes())
        address = (home / _ADDRESS_FILE).read_text().strip()
        key = _load_key(home / _AGENT_FILE)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            str(home), f"expected a device that has joined: run `fedloom-agent join` ({error})"
        ) from error
    name = subject_of(certificate).name
    return Identity(
        name, address, key, certificate, authority, exchange, signing, issuers=tuple(issuers)
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256, for people to compare."""
    return hashlib.sha256(certificate.public_bytes(_DER)).hexdigest()


def key_fingerprint(request: x509.CertificateSigningRequest) -> str:
    """Return the SHA-256 of the key that a request is for, for people to compare."""
    return hashlib.sha256(public_key_bytes(request)).hexdigest()


def _require_ours(
    chain: Sequence[bytes], key: ec.EllipticCurvePrivateKey, authority: x509.Certificate
) -> str:
    """Return the name in a certificate that the authority stands behind; raises Refused."""
    try:
        issued = verified_client(chain, authority, datetime.now(UTC))
    except UntrustedChain as error:
        raise Refused(
            Reason.INVALID_TOKEN,
            f"expected a certificate by the authority that is pinned: {error.problem}",
        ) from error
    subject = subject_of(issued)
    if issued.public_key() != key.public_key() or subject.role != AGENT_ROLE:
        raise Refused(Reason.INVALID_TOKEN, "expected an agent's certificate for this device's key")
    return subject.name


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(str(path), "expected an ECDSA key")
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
