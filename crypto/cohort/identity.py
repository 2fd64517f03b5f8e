"""Signatures by an agent's identity. Certificates, and whom to trust, stay outside this package."""

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_SIZE = 64

Sign = Callable[[bytes], bytes]  # statement → Ed25519 signature (RFC 8032), 64 bytes
Verify = Callable[[str, bytes, bytes], bool]
"""(agent id, statement, signature) → whether the agent of this name signed it, by a chain that ends
at the authority which this device pinned. It must be False, not an error, for a stranger."""


def ed25519_signer(identity: Ed25519PrivateKey) -> Sign:
    """Return the signing function of one identity."""
    return identity.sign


def ed25519_valid(public_key: bytes, statement: bytes, signature: bytes) -> bool:
    """Say whether the owner of an Ed25519 public key, 32 bytes, signed a statement."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        return False
    return True
