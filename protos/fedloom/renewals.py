"""How an agent's old key vouches for its next one, so that an offline authority can see it.

statement = label, a zero byte, the signing request (DER)
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

_LABEL = b"fedloom v1 renewal"


def sign_renewal(key: ec.EllipticCurvePrivateKey, request: bytes) -> bytes:
    """Return the old key's signature (DER) over the request for the new one."""
    return key.sign(_LABEL + b"\0" + request, ec.ECDSA(hashes.SHA256()))


def check_renewal(key: CertificatePublicKeyTypes, request: bytes, signature: bytes) -> None:
    """Raise InvalidSignature unless the old key has signed the request for the new one."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidSignature
    key.verify(signature, _LABEL + b"\0" + request, ec.ECDSA(hashes.SHA256()))
