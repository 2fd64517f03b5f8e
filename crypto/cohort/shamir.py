"""Shamir's secret sharing (Communications of the ACM 22(11), 1979) of 32-byte secrets.

Over GF(p), p = 2^256 + 297, the smallest prime above 2^256, so that every secret is an element. The
secret is f(0), little-endian; the member of slot j holds f(j + 1), 33 bytes little-endian. f has
degree t - 1: t shares determine it, and fewer say nothing about f(0).
"""

from collections.abc import Mapping, Sequence

from ..errors import MalformedMessage, ShareMismatch
from .quorum import SECRET_SIZE

PRIME = (1 << 256) + 297
SHARE_SIZE = 33
COEFFICIENT_SIZE = 48  # random bytes reduced modulo p: uniform up to 2^-127


def deal(secret: bytes, randomness: bytes, holders: Sequence[int]) -> dict[int, bytes]:
    """Return each holder's share; the degree is len(randomness) / 48.

    The same secret, randomness and holders give the same shares: a repeated delivery is the same.
    """
    starts = range(0, len(randomness), COEFFICIENT_SIZE)
    drawn = [randomness[start : start + COEFFICIENT_SIZE] for start in starts]
    numbers = [int.from_bytes(piece, "little") % PRIME for piece in (secret, *drawn)]
    return {slot: _evaluate(numbers, slot + 1).to_bytes(SHARE_SIZE, "little") for slot in holders}


def recover(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret from shares by slot, of which the `threshold` lowest slots' are used.

    Raises ShareMismatch where there are too few, or no secret has these shares. Wrong shares may
    give a wrong secret: compare it with what its owner committed to.
    """
    if len(shares) < threshold:
        raise ShareMismatch("shares of a secret", f"at least {threshold}", len(shares))
    used = sorted(shares)[:threshold]
    secret = 0
    for slot in used:
        above, below = 1, 1
        for other in used:
            if other != slot:
                above = above * (other + 1) % PRIME
                below = below * (other - slot) % PRIME
        weight = above * pow(below, -1, PRIME)
        secret = (secret + check_share(shares[slot]) * weight) % PRIME
    if secret >> (8 * SECRET_SIZE):
        raise ShareMismatch("recovered secret", "32 bytes", "more")
    return secret.to_bytes(SECRET_SIZE, "little")


def check_share(share: bytes) -> int:
    """Return a share's number; raises MalformedMessage for one that is no element of the field."""
    number = int.from_bytes(share, "little")
    if len(share) != SHARE_SIZE or number >= PRIME:
        raise MalformedMessage("share", "33 bytes below p", f"{len(share)} bytes")
    return number


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
