"""What one member knows in one attempt: everything follows from 32 random bytes.

HKDF-SHA256 (RFC 5869), empty salt, 32 bytes out. From the attempt's secret, with info =
`fedloom v1 ` label `\\0` run id(16) round(u32) attempt(u16):

    `mask private key`, `share private key`   X25519 (RFC 7748)
    `self mask seed`                          what the commitment is to, and what is released
    `share randomness`                        key of the polynomials' coefficients, with the
                                              cohort's digest behind the info: the keystream of
                                              AES-256-CTR from counter 0, 48 bytes a coefficient
                                              of x, x^2, …: first the seed's, then the mask key's

Two members a < b (slots) of a cohort with digest D:

    pair mask    HKDF(X25519(mask keys), `fedloom v1 pair mask\\0` D a(u16) b(u16))
    self mask    HKDF(seed, `fedloom v1 self mask\\0` D slot(u16))
    box          ChaCha20-Poly1305 under HKDF(X25519(share keys), `fedloom v1 share box\\0` D
                 sender(u16) recipient(u16)), nonce zero, no associated data, of two shares: the
                 sender's seed's, its mask key's

A box's key is used for one box: the keys are fresh in each attempt, a member takes up one cohort in
it, and its shares are derived, not drawn, so that a repeated delivery is the same bytes.

Whoever sees D differently, or another attempt, has other masks and other boxes: views that a
lying coordinator splits never add up.
"""

import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import CohortRefused, SharesRefused
from ..masks import Mask
from .messages import AttemptId, Cohort
from .quorum import neighbours, threshold
from .shamir import COEFFICIENT_SIZE, SHARE_SIZE, deal

_NONCE = bytes(12)


@dataclass(frozen=True, slots=True, repr=False)
class AttemptSecret:
    """One member's secrets of one attempt. Fresh in each: `value` is 32 random bytes."""

    value: bytes
    attempt: AttemptId

    def __repr__(self) -> str:
        return "AttemptSecret(<secret>)"

    @property
    def mask_key(self) -> bytes:
        """The X25519 private key behind the pairwise masks, which others recover if we vanish."""
        return self._derive(b"mask private key")

    @property
    def share_key(self) -> bytes:
        """The X25519 private key to which shares are sealed; nobody ever recovers it."""
        return self._derive(b"share private key")

    @property
    def seed(self) -> bytes:
        """The seed of the self mask, which is released with the sum."""
        return self._derive(b"self mask seed")

    def boxes(self, cohort: Cohort, slot: int) -> tuple[bytes, ...]:
        """Deal our two secrets to the other members, each share sealed to its holder."""
        others = _others(cohort, slot)
        size = COEFFICIENT_SIZE * (threshold(len(cohort.members)) - 1)
        key = self._derive(b"share randomness", cohort.digest)
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        seeds = deal(self.seed, stream.update(bytes(size)), others)
        mask_keys = deal(self.mask_key, stream.update(bytes(size)), others)
        return tuple(
            _box_cipher(self.share_key, cohort, slot, other, other).encrypt(
                _NONCE, seeds[other] + mask_keys[other], None
            )
            for other in others
        )

    def opened(self, cohort: Cohort, slot: int, boxes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Open the boxes that the others sealed to us: (seed's share, mask key's share) joined."""
        others = _others(cohort, slot)
        if len(boxes) != len(others):
            raise SharesRefused("boxes", len(others), len(boxes))
        opened = []
        for other, box in zip(others, boxes, strict=True):
            cipher = _box_cipher(self.share_key, cohort, other, slot, other)
            try:
                opened.append(cipher.decrypt(_NONCE, box, None))
            except InvalidTag as error:
                name = cohort.members[other].agent_id
                raise SharesRefused("box", f"one sealed to us by {name}", "another") from error
        return tuple(opened)

    def masks(self, cohort: Cohort, slot: int) -> tuple[Mask, ...]:
        """Return all masks of our upload: our own, and one with each neighbour."""
        own = Mask(self_mask_key(self.seed, cohort.digest, slot))
        return (own, *pair_masks(self.mask_key, cohort, slot))

    def _derive(self, label: bytes, context: bytes = b"") -> bytes:
        a = self.attempt
        bound = a.run_id + struct.pack("<IH", a.round, a.attempt) + context
        return _hkdf(self.value, b"fedloom v1 " + label + b"\0" + bound)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key of a private one, both 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def usable(public: bytes) -> bool:
    """Say whether an exchange with this X25519 public key gives a secret (RFC 7748 §6.1)."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def commitment(seed: bytes) -> bytes:
    """Commit to a seed; it hides it because a seed has 256 random bits."""
    return hashlib.sha256(b"fedloom v1 seed\0" + seed).digest()


def self_mask_key(seed: bytes, digest: bytes, slot: int) -> bytes:
    """Derive the AES key of a member's self mask."""
    return _hkdf(seed, b"fedloom v1 self mask\0" + digest + struct.pack("<H", slot))


def pair_masks(private: bytes, cohort: Cohort, slot: int) -> tuple[Mask, ...]:
    """Derive the masks between a member, of whom we have the mask key, and its neighbours."""
    near = neighbours(cohort.digest, len(cohort.members), slot, cohort.group_of)
    return tuple(pair_mask(private, cohort, slot, other) for other in near)


def pair_mask(private: bytes, cohort: Cohort, slot: int, other: int) -> Mask:
    """Derive one mask as it is in the upload of `slot`, whose mask key this is."""
    low, high = min(slot, other), max(slot, other)
    info = b"fedloom v1 pair mask\0" + cohort.digest + struct.pack("<HH", low, high)
    shared = _exchange(private, cohort.members[other].mask_key, cohort.members[other].agent_id)
    return Mask(_hkdf(shared, info), 1 if slot == low else -1)


def _box_cipher(
    private: bytes, cohort: Cohort, sender: int, recipient: int, other: int
) -> ChaCha20Poly1305:
    info = b"fedloom v1 share box\0" + cohort.digest + struct.pack("<HH", sender, recipient)
    peer = cohort.members[other]
    return ChaCha20Poly1305(_hkdf(_exchange(private, peer.share_key, peer.agent_id), info))


def _exchange(private: bytes, public: bytes, agent_id: str) -> bytes:
    try:  # an all-zero result is refused, RFC 7748 §6.1
        key = X25519PrivateKey.from_private_bytes(private)
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise CohortRefused(f"{agent_id}'s key", "a point of large order", "another") from error


def _others(cohort: Cohort, slot: int) -> tuple[int, ...]:
    return tuple(other for other in range(len(cohort.members)) if other != slot)


def _hkdf(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)


def splits(joined: bytes) -> tuple[bytes, bytes]:
    """Split what a box holds: the seed's share, the mask key's share."""
    return joined[:SHARE_SIZE], joined[SHARE_SIZE:]
