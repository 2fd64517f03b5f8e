"""Keys that other agents must be able to check: signed by an agent's certificate.

statement = label, a zero byte, the length of the agent's name (u8), the name in UTF-8, the key
"""

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedloom.errors import Reason, Refused

EXCHANGE_KEY = b"fedloom v1 exchange key"  # X25519: run keys are wrapped for it
IDENTITY_KEY = b"fedloom v1 identity key"  # Ed25519: signs what a cohort agrees on
KEY_BYTES = 32


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
    label: bytes,
    agent_id: str,
    public_key: bytes,
    signature: bytes,
    certificate: bytes,
    authority: x509.Certificate,
) -> None:
    """Raise Refused(KEY_UNAVAILABLE) unless the authority's certificate for this name vouches.

    `certificate` is DER and foreign, as everything here but the authority.
    """
    wrong = Refused(
        Reason.KEY_UNAVAILABLE, f"expected {agent_id[:64]}'s key, signed under our authority"
    )
    try:
        issued = x509.load_der_x509_certificate(certificate)
        issued.verify_directly_issued_by(authority)
        names = issued.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        signer = issued.public_key()
        if [name.value for name in names] != [agent_id] or len(public_key) != KEY_BYTES:
            raise wrong
        if not isinstance(signer, ec.EllipticCurvePublicKey):
            raise wrong
        signer.verify(signature, statement(label, agent_id, public_key), ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise wrong from error
