"""Run keys: derivation to the bit, wrapping, and that nothing shows them."""

import hashlib
import hmac
import traceback
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from crypto import (
    RUN_KEY_SIZE,
    WRAPPED_KEY_SIZE,
    InvalidContext,
    RunKey,
    UnwrapFailed,
    WrapContext,
    WrapRefused,
    generate_exchange_key,
    generate_run_key,
    unwrap,
    wrap,
)
from crypto.run_key import ternary_secret

RUN_KEY, RUN_ID = RunKey(bytes(range(32))), bytes(range(16))
CONTEXT = WrapContext(RUN_ID, 1, "kitchen-pi", "hall-phone")
SENDER, RECIPIENT = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
WRAPPED = (
    "46444c4b1d00cda9e934b68a4ba8d4f952e1e5936979b1b1eb52571f3010a2d7"
    "5b1a256aa3d2e7a7f657106b1c15abc8b149338b35e5362ccfe5c36a981cc1e6"
)
SMALL_ORDER = [  # RFC 7748, §6.1 and curve25519's other points whose product is always zero
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def slow_hkdf(key: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) with an empty salt, 32 bytes out: two HMACs."""
    return hmac.digest(hmac.digest(bytes(32), key, "sha256"), info + b"\1", "sha256")


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
def test_the_secret_is_derived_as_documented(secret, run_id):
    key = slow_hkdf(secret, b"fedloom v1 bfv secret\0" + run_id)
    blocks = b"".join(i.to_bytes(16, "big") for i in range(512))
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)  # noqa: S305 - CTR
    expected = [byte % 3 - 1 for byte in stream if byte != 255][:4096]
    assert ternary_secret(RunKey(secret), run_id).tolist() == expected


def test_known_answer_of_the_secret():
    secret = ternary_secret(RUN_KEY, RUN_ID)
    assert (secret.dtype, secret.shape) == (np.int8, (4096,))
    assert secret[:16].tolist() == [0, 0, -1, 1, -1, -1, 0, -1, -1, 1, 0, 0, 1, -1, -1, -1]
    digest = "f63e1f3ffdb5db857e52eeb04c1b57139bcf9cae98edcc3d20809a9b8167c83b"
    assert hashlib.sha256(secret.tobytes()).hexdigest() == digest


def test_the_secret_is_uniform():
    counts = sum(np.bincount(ternary_secret(RUN_KEY, bytes([i] * 16)) + 1) for i in range(50))
    expected = 50 * 4096 / 3
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 20  # two degrees of freedom: p = 5e-5


def test_labels_and_runs_separate():
    keys = {
        RUN_KEY.derive("bfv secret", RUN_ID),
        RUN_KEY.derive("tag key", RUN_ID),
        RUN_KEY.derive("bfv secret", bytes(16)),
        RunKey(bytes(32)).derive("bfv secret", RUN_ID),
    }
    assert len(keys) == 4


def test_generated_keys_differ():
    assert generate_run_key() != generate_run_key()
    assert len(generate_run_key().secret) == RUN_KEY_SIZE
    assert public(generate_exchange_key()) != public(generate_exchange_key())


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_run_key_of_another_length_is_refused(size):
    with pytest.raises(InvalidContext):
        RunKey(bytes(size))


def test_a_wrapped_key_unwraps():
    wrapped = wrap(RUN_KEY, SENDER, public(RECIPIENT), CONTEXT)
    assert len(wrapped) == WRAPPED_KEY_SIZE
    assert RUN_KEY.secret not in wrapped
    assert unwrap(wrapped, RECIPIENT, public(SENDER), CONTEXT) == RUN_KEY
    assert wrap(RUN_KEY, SENDER, public(RECIPIENT), CONTEXT) != wrapped  # the nonce is fresh


def test_known_answer_of_wrapping():
    """A wrapped key of other hands: bytes that were made once."""
    wrapped = bytes.fromhex(WRAPPED)
    assert unwrap(wrapped, RECIPIENT, public(SENDER), CONTEXT) == RUN_KEY


@pytest.mark.parametrize("place", range(WRAPPED_KEY_SIZE))
def test_no_byte_of_a_wrapped_key_may_differ(place):
    wrapped = bytearray(wrap(RUN_KEY, SENDER, public(RECIPIENT), CONTEXT))
    wrapped[place] ^= 1
    with pytest.raises(UnwrapFailed):
        unwrap(bytes(wrapped), RECIPIENT, public(SENDER), CONTEXT)


@pytest.mark.parametrize("wrapped", [b"", b"FDLK", bytes(64), b"FDLK" + bytes(61)])
def test_a_wrapped_key_of_another_shape_is_refused(wrapped):
    with pytest.raises(UnwrapFailed):
        unwrap(wrapped, RECIPIENT, public(SENDER), CONTEXT)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": bytes(16)},
        {"key_id": 2},
        {"sender_id": "kitchen-p"},
        {"recipient_id": "ihall-phone"},
        {"sender_id": "hall-phone", "recipient_id": "kitchen-pi"},
    ],
)
def test_a_key_wrapped_in_another_context_is_refused(change):
    wrapped = wrap(RUN_KEY, SENDER, public(RECIPIENT), replace(CONTEXT, **change))
    with pytest.raises(UnwrapFailed):
        unwrap(wrapped, RECIPIENT, public(SENDER), CONTEXT)


def test_a_key_for_or_from_someone_else_is_refused():
    third = generate_exchange_key()
    for sender, recipient in ((SENDER, third), (third, RECIPIENT)):
        wrapped = wrap(RUN_KEY, sender, public(recipient), CONTEXT)
        with pytest.raises(UnwrapFailed):
            unwrap(wrapped, RECIPIENT, public(SENDER), CONTEXT)


def test_a_key_is_not_reflected_to_its_sender():
    wrapped = wrap(RUN_KEY, SENDER, public(RECIPIENT), CONTEXT)
    with pytest.raises(UnwrapFailed):
        unwrap(wrapped, SENDER, public(RECIPIENT), CONTEXT)


@pytest.mark.parametrize("point", [*SMALL_ORDER, b"", bytes(31), bytes(33)])
def test_a_public_key_without_a_secret_is_refused(point):
    with pytest.raises(WrapRefused):
        wrap(RUN_KEY, SENDER, point, CONTEXT)
    with pytest.raises(UnwrapFailed):
        unwrap(b"FDLK" + bytes(60), RECIPIENT, point, CONTEXT)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": b""},
        {"key_id": -1},
        {"key_id": 1 << 32},
    ],
)
def test_a_binding_out_of_range_is_refused(change):
    with pytest.raises(InvalidContext):
        replace(CONTEXT, **change)


@pytest.mark.parametrize("identity", ["", "x" * 256, "ü" * 128])
def test_an_agent_id_must_fit_its_length_byte(identity):
    with pytest.raises(InvalidContext):
        wrap(RUN_KEY, SENDER, public(RECIPIENT), replace(CONTEXT, sender_id=identity))


def test_no_text_shows_a_key():
    key = RunKey(b"the secret of this run, 32 bytes")
    texts = [repr(key), str(key), f"{key}", repr([key]), repr({"key": key})]
    wrapped = wrap(key, SENDER, public(RECIPIENT), CONTEXT)
    try:
        unwrap(wrapped, RECIPIENT, public(SENDER), replace(CONTEXT, key_id=9))
    except UnwrapFailed as refusal:
        texts += [repr(refusal), "".join(traceback.format_exception(refusal))]
    assert len(texts) == 7
    for text in texts:
        assert "secret of this run" not in text
        assert key.secret.hex() not in text
