"""Holders of keys: what devices, operators and servers have, without the device around it."""

from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.certificates import new_key, private_key_pem, request_for
from coordinator.services.access import public_key_sha256

PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


@dataclass(frozen=True)
class Holder:
    """A key, and the chain (DER, leaf first) that somebody gave it."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key, repr=False)
    chain: tuple[bytes, ...] = ()

    @property
    def request(self) -> x509.CertificateSigningRequest:
        """A signing request for the key."""
        return request_for(self.key)

    @property
    def request_der(self) -> bytes:
        """The same as bytes."""
        return self.request.public_bytes(DER)

    @property
    def digest(self) -> bytes:
        """How the roster knows the key."""
        return public_key_sha256(self.request)

    @property
    def key_pem(self) -> bytes:
        """The key, for TLS."""
        return private_key_pem(self.key)

    @property
    def chain_pem(self) -> bytes:
        """The chain, for TLS."""
        return pem_of(self.chain)

    def write(self, path: Path) -> Path:
        """Write key and chain into one file, as Python's `ssl` wants it."""
        path.write_bytes(self.key_pem + self.chain_pem)
        return path


def pem_of(chain: tuple[bytes, ...]) -> bytes:
    """Return a chain as TLS peers show it."""
    return b"".join(x509.load_der_x509_certificate(link).public_bytes(PEM) for link in chain)
