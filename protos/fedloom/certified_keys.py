"""Keys that other agents must be able to check: signed by an agent's certificate.

statement = label, a zero byte, the length of the agent's name (u8), the name in UTF-8, the key
"""

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.chains import AGENT_ROLE, Subject, UntrustedChain, subject_of, verified_client
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

EXCHANGE_KEY = b"fedloom v1 exchange key"  # X25519: run keys are wrapped for it
IDENTITY_KEY = b"fedloom v1 identity key"  # Ed25519: signs what a cohort agrees on
KEY_BYTES = 32


@dataclass(frozen=True)
class CertifiedKey:
    """A public key as its agent advertises it; foreign until it is checked."""

    public_key: bytes
    signature: bytes  # ECDSA, DER
    chain: tuple[bytes, ...]  # DER, the agent's certificate first

    @classmethod
    def of(cls, message: control_pb2.ExchangeKey | control_pb2.IdentityKey) -> "CertifiedKey":
        """Read a message; nothing is checked."""
        chain = (message.certificate, *message.issuers)
        return cls(message.public_key, message.signature, chain)


def statement(label: bytes, agent_id: str, public_key: bytes) -> bytes:
    """Return what the certificate's key signs."""
    name = agent_id.encode()
    return label + b"\0" + bytes([len(name)]) + name + public_key


def certify(
    label: bytes, agent_id: str, public_key: bytes, key: ec.EllipticCurvePrivateKey
) -> bytes:
    """Return the signature (DER) that binds a public key to the agent's name."""
    return key.sign(statement(label, agent_id, public_key), ec.ECDSA(hashes.SHA256()))


def check_certified(
    label: bytes, agent_id: str, key: CertifiedKey, authority: x509.Certificate, now: datetime
) -> None:
    """Raise Refused(KEY_UNAVAILABLE) unless an agent of this name vouches for the key.

    Its certificate must lead to the pinned authority, over at most one issuer. Everything here but
    the authority is foreign.
    """
    expected = f"expected {agent_id[:64]}'s key, signed under our authority"
    try:
        certificate = verified_client(key.chain, authority, now)
        signer = certificate.public_key()
        if subject_of(certificate) != Subject(agent_id, AGENT_ROLE):
            raise Refused(Reason.KEY_UNAVAILABLE, f"{expected}: the certificate is another's")
        if len(key.public_key) != KEY_BYTES or not isinstance(signer, ec.EllipticCurvePublicKey):
            raise Refused(Reason.KEY_UNAVAILABLE, f"{expected}: found a key of another kind")
        signed = statement(label, agent_id, key.public_key)
        signer.verify(key.signature, signed, ec.ECDSA(hashes.SHA256()))
    except UntrustedChain as error:
        raise Refused(Reason.KEY_UNAVAILABLE, f"{expected}: {error.problem}") from error
    except (ValueError, TypeError, InvalidSignature) as error:
        raise Refused(Reason.KEY_UNAVAILABLE, f"{expected}: the signature is wrong") from error
