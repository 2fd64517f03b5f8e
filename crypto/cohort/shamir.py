"""Shamir's secret sharing (Communications of the ACM 22(11), 1979) of 32-byte secrets.

Over GF(p), p = 2^256 + 297, the smallest prime above 2^256, so that every secret is an element. The
secret is f(0), little-endian; the member of slot j holds f(j + 1), 33 bytes little-endian. f has
degree t - 1: t shares determine it, and fewer say nothing about f(0).
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

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
    used = tuple(sorted(shares)[:threshold])
    numbers = [check_share(shares[slot]) for slot in used]
    terms = (weight * number for weight, number in zip(_weights(used), numbers, strict=True))
    secret = sum(terms) % PRIME
    if secret >> (8 * SECRET_SIZE):
        raise ShareMismatch("recovered secret", "32 bytes", "more")
    return secret.to_bytes(SECRET_SIZE, "little")


@lru_cache(maxsize=16)  # of many who vanished, the same members hold shares
def _weights(slots: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's coefficients at 0 for the points slot + 1."""
    weights = []
    for slot in slots:
        others = [other for other in slots if other != slot]
        above = math.prod(other + 1 for other in others)
        below = math.prod(other - slot for other in others)
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


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
