"""The run key: 32 random bytes from which every secret of a run is derived, and how it travels.

One agent makes it and wraps it for each other member; the coordinator carries the wrapped bytes
and never holds the key. No serialised SEAL key travels: each agent derives the same BFV secret.

Derivation. HKDF-SHA256 (RFC 5869), empty salt, input = the run key, 32 bytes out, info =
`fedloom v1 ` label `\\0` run_id(16). Labels in use: `bfv secret`. Reserved for protection
`sealed`: `tag key`. A new use takes a new label, never an old one.

BFV secret. The keystream of AES-256-CTR with the derived key and an initial counter block of 16
zero bytes, byte by byte: 255 is skipped, any other byte b gives the coefficient (b mod 3) - 1, of
x^0 first, until there are 4096. 255 = 3·85, so each of -1, 0, 1 has probability exactly 1/3, which
is the distribution that SEAL's own key generator draws from.

Wrapping. X25519 between the sender's and the recipient's exchange keys (RFC 7748; an all-zero
result is refused as in §6.1), HKDF-SHA256 over it with everything that names the two parties and
the key in `info`, ChaCha20-Poly1305 (RFC 8439) with a random nonce. This is the shape of HPKE's
authenticated mode (RFC 9180, §5.1.3) with long-lived sender keys. 64 bytes:

    offset  size  content
    0       4     `FDLK`
    4       12    nonce, random
    16      32    the run key, encrypted
    48      16    Poly1305 tag

    info = `fedloom v1 wrap\\0` sender public(32) recipient public(32) run_id(16)
           key_id(u32, little-endian) length(u8) sender_id(UTF-8) length(u8) recipient_id(UTF-8)

The associated data are empty: all of it is in the key already.
"""

import secrets
import struct
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from .errors import InvalidContext, UnwrapFailed, WrapRefused
from .parameters import RING_DEGREE

RUN_KEY_SIZE = 32
WRAPPED_KEY_SIZE = 64

_MAGIC = b"FDLK"
_NONCE_SIZE = 12
_KEYSTREAM_SIZE = 2 * RING_DEGREE  # 4112 bytes are needed on average; more than 8192 never are


@dataclass(frozen=True, slots=True, repr=False)
class RunKey:
    """The secret of a run. Neither repr, str nor any error shows it."""

    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != RUN_KEY_SIZE:
            raise InvalidContext("length of a run key", RUN_KEY_SIZE, len(self.secret))

    def __repr__(self) -> str:
        return "RunKey(<secret>)"

    def derive(self, label: str, run_id: bytes) -> bytes:
        """Derive 32 bytes for one purpose of one run."""
        info = b"fedloom v1 " + label.encode() + b"\0" + run_id
        return HKDF(SHA256(), 32, salt=None, info=info).derive(self.secret)


@dataclass(frozen=True)
class WrapContext:
    """What a wrapped key is bound to."""

    run_id: bytes  # 16 bytes
    key_id: int  # u32, rises with every rotation within the run
    sender_id: str  # 1 .. 255 bytes of UTF-8
    recipient_id: str  # 1 .. 255 bytes of UTF-8

    def __post_init__(self) -> None:
        if len(self.run_id) != 16:
            raise InvalidContext("length of run_id", "16 bytes", f"{len(self.run_id)} bytes")
        if not 0 <= self.key_id < 1 << 32:
            raise InvalidContext("key_id", "0 .. 2^32 - 1", self.key_id)

    def info(self, sender_public: bytes, recipient_public: bytes) -> bytes:
        """Encode the binding for HKDF; no two different bindings have the same bytes."""
        return b"".join(
            (
                b"fedloom v1 wrap\0",
                sender_public,
                recipient_public,
                self.run_id,
                struct.pack("<I", self.key_id),
                _named(self.sender_id),
                _named(self.recipient_id),
            )
        )


def generate_run_key() -> RunKey:
    """Make a run key from the operating system's randomness."""
    return RunKey(secrets.token_bytes(RUN_KEY_SIZE))


def generate_exchange_key() -> X25519PrivateKey:
    """Make the X25519 key to which other agents wrap run keys."""
    return X25519PrivateKey.generate()


def wrap(
    run_key: RunKey, sender: X25519PrivateKey, recipient_public: bytes, context: WrapContext
) -> bytes:
    """Encrypt the run key for one recipient, authenticated by the sender's exchange key.

    Whose `recipient_public` it is must have been verified before: this function cannot know.
    """
    sender_public = sender.public_key().public_bytes_raw()
    info = context.info(sender_public, recipient_public)
    try:
        key = _shared_key(sender, recipient_public, info)
    except ValueError as error:
        raise WrapRefused("recipient's public key", "a point of large order", "another") from error
    nonce = secrets.token_bytes(_NONCE_SIZE)
    return _MAGIC + nonce + ChaCha20Poly1305(key).encrypt(nonce, run_key.secret, None)


def unwrap(
    wrapped: bytes, recipient: X25519PrivateKey, sender_public: bytes, context: WrapContext
) -> RunKey:
    """Decrypt a run key that `sender_public` wrapped for `recipient` in exactly this context."""
    if len(wrapped) != WRAPPED_KEY_SIZE or wrapped[:4] != _MAGIC:
        raise UnwrapFailed(
            "wrapped key", f"{WRAPPED_KEY_SIZE} bytes after {_MAGIC!r}", f"{len(wrapped)} bytes"
        )
    info = context.info(sender_public, recipient.public_key().public_bytes_raw())
    nonce, sealed = wrapped[4 : 4 + _NONCE_SIZE], wrapped[4 + _NONCE_SIZE :]
    try:
        key = _shared_key(recipient, sender_public, info)
        return RunKey(ChaCha20Poly1305(key).decrypt(nonce, sealed, None))
    except ValueError as error:
        raise UnwrapFailed("sender's public key", "a point of large order", "another") from error
    except InvalidTag as error:
        raise UnwrapFailed("wrapped key", f"one for {context}", "another, or altered") from error


def ternary_secret(run_key: RunKey, run_id: bytes) -> NDArray[np.int8]:
    """Derive the BFV secret polynomial s of a run, as the module's docstring says to the bit."""
    key = run_key.derive("bfv secret", run_id)
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    stream = np.frombuffer(cipher.update(bytes(_KEYSTREAM_SIZE)), np.uint8)
    accepted = stream[stream != 255][:RING_DEGREE]
    secret: NDArray[np.int8] = (accepted % 3).astype(np.int8)
    secret -= 1
    return secret  # (4096,) int8 in {-1, 0, 1}


def _shared_key(private: X25519PrivateKey, public: bytes, info: bytes) -> bytes:
    secret = private.exchange(X25519PublicKey.from_public_bytes(public))  # refuses all zeros
    return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)


def _named(identity: str) -> bytes:
    encoded = identity.encode()
    if not 1 <= len(encoded) <= 255:
        raise InvalidContext("length of an agent id", "1 .. 255 bytes", len(encoded))
    return bytes([len(encoded)]) + encoded
