"""Who this device is: its keys, its certificate, and the authority that it pinned on joining."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID

from crypto import generate_exchange_key
from fedloom.certified_keys import EXCHANGE_KEY, IDENTITY_KEY, certify, check_certified
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.secret_files import make_private_folder, write_secret
from fedloom.v1 import control_pb2

_KEY_FILE = "agent.key"
_CERTIFICATE_FILE = "agent.pem"
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

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return mutual TLS credentials that trust the pinned authority only."""
        return grpc.ssl_channel_credentials(
            self.authority.public_bytes(_PEM),
            _key_pem(self.key),
            self.certificate.public_bytes(_PEM),
        )

    def advertised_exchange_key(self) -> control_pb2.ExchangeKey:
        """Return this device's X25519 key, certified."""
        public = self.exchange_key.public_key().public_bytes_raw()
        return control_pb2.ExchangeKey(
            public_key=public,
            signature=certify(EXCHANGE_KEY, self.agent_id, public, self.key),
            certificate=self.certificate.public_bytes(_DER),
        )

    def advertised_identity_key(self) -> control_pb2.IdentityKey:
        """Return this device's Ed25519 key, certified."""
        public = self.identity_key.public_key().public_bytes_raw()
        return control_pb2.IdentityKey(
            public_key=public,
            signature=certify(IDENTITY_KEY, self.agent_id, public, self.key),
            certificate=self.certificate.public_bytes(_DER),
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
        check_certified(
            label, agent_id, key.public_key, key.signature, key.certificate, self.authority
        )
        return key.public_key


def new_key(home: Path) -> ec.EllipticCurvePrivateKey:
    """Return the device's TLS key, made once and kept: a repeated join asks for the same key."""
    make_private_folder(home)
    path = home / _KEY_FILE
    if path.exists():
        return _load_key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, _key_pem(key))
    return key


def certificate_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a signing request (DER) for the key; the coordinator chooses the name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(_DER)


def save_membership(
    home: Path,
    key: ec.EllipticCurvePrivateKey,
    certificate: bytes,
    authority: bytes,
    control_address: str,
) -> Identity:
    """Keep what enrolment gave, after checking that it fits our key and the token's authority."""
    try:
        issued = x509.load_der_x509_certificate(certificate)
        pinned = x509.load_der_x509_certificate(authority)
        issued.verify_directly_issued_by(pinned)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise Refused(
            Reason.INVALID_TOKEN, "expected a certificate by the token's authority, found another"
        ) from error
    if issued.public_key() != key.public_key():
        raise Refused(Reason.INVALID_TOKEN, "expected a certificate for this device's key")
    (home / _CERTIFICATE_FILE).write_bytes(issued.public_bytes(_PEM))
    (home / _AUTHORITY_FILE).write_bytes(pinned.public_bytes(_PEM))
    if not (home / _EXCHANGE_KEY_FILE).exists():
        write_secret(home / _EXCHANGE_KEY_FILE, generate_exchange_key().private_bytes_raw())
    if not (home / _IDENTITY_KEY_FILE).exists():
        write_secret(home / _IDENTITY_KEY_FILE, Ed25519PrivateKey.generate().private_bytes_raw())
    (home / _ADDRESS_FILE).write_text(control_address + "\n")
    return load_identity(home)


def load_identity(home: Path) -> Identity:
    """Read the device's identity; raises ConfigError that says to join first."""
    try:
        certificate = x509.load_pem_x509_certificate((home / _CERTIFICATE_FILE).read_bytes())
        authority = x509.load_pem_x509_certificate((home / _AUTHORITY_FILE).read_bytes())
        exchange = X25519PrivateKey.from_private_bytes((home / _EXCHANGE_KEY_FILE).read_bytes())
        signing = Ed25519PrivateKey.from_private_bytes((home / _IDENTITY_KEY_FILE).read_bytes())
        address = (home / _ADDRESS_FILE).read_text().strip()
        key = _load_key(home / _KEY_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(
            str(home), f"expected a device that has joined: run `fedloom-agent join` ({error})"
        ) from error
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return Identity(str(name), address, key, certificate, authority, exchange, signing)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256, for people to compare."""
    return hashlib.sha256(certificate.public_bytes(_DER)).hexdigest()


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(str(path), "expected an ECDSA key")
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
