"""The bridge to SEAL against slow arithmetic that knows nothing of SEAL."""

import hashlib
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import RunKey
from crypto.bfv import KeyedRing, Ring
from crypto.parameters import HALF_UNITS, MODULUS, RING_DEGREE, largest_plain_bits
from crypto.run_key import ternary_secret

PLAIN_BITS = 47
SECRET = ternary_secret(RunKey(bytes(range(32))), bytes(range(16)))
SEED = bytes(range(64))

BLAKE2B_IV = [
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
]
BLAKE2B_SIGMA = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
]
WORD = (1 << 64) - 1


def blake2b(message: bytes, parameters: bytes, key: bytes = b"") -> bytes:
    """BLAKE2b (RFC 7693) with any parameter block: hashlib refuses those of BLAKE2X."""
    state = [a ^ b for a, b in zip(BLAKE2B_IV, struct.unpack("<8Q", parameters), strict=True)]
    data = (key.ljust(128, b"\0") if key else b"") + message
    blocks = [data[i : i + 128] for i in range(0, len(data), 128)]
    done = 0
    for number, block in enumerate(blocks):
        done += len(block)
        words = struct.unpack("<16Q", block.ljust(128, b"\0"))
        v = [*state, *BLAKE2B_IV]
        v[12] ^= done
        v[14] ^= WORD if number == len(blocks) - 1 else 0
        for turn in range(12):
            sigma = BLAKE2B_SIGMA[turn % 10]
            for i, (a, b, c, d) in enumerate(
                [
                    (0, 4, 8, 12),
                    (1, 5, 9, 13),
                    (2, 6, 10, 14),
                    (3, 7, 11, 15),
                    (0, 5, 10, 15),
                    (1, 6, 11, 12),
                    (2, 7, 8, 13),
                    (3, 4, 9, 14),
                ]
            ):
                for word, first, second in (
                    (words[sigma[2 * i]], 32, 24),
                    (words[sigma[2 * i + 1]], 16, 63),
                ):
                    v[a] = (v[a] + v[b] + word) & WORD
                    v[d] = _rotated(v[d] ^ v[a], first)
                    v[c] = (v[c] + v[d]) & WORD
                    v[b] = _rotated(v[b] ^ v[c], second)
        state = [s ^ x ^ y for s, x, y in zip(state, v[:8], v[8:], strict=True)]
    return struct.pack("<8Q", *state)


def _rotated(word: int, by: int) -> int:
    return (word >> by | word << (64 - by)) & WORD


def blake2xb(message: bytes, key: bytes, size: int) -> bytes:
    """BLAKE2Xb as its authors specify it (blake2.net/blake2x.pdf), for multiples of 64 bytes."""
    root_block = struct.pack("<BBBBIIIBB14x32x", 64, len(key), 1, 1, 0, 0, size, 0, 0)
    root = blake2b(message, root_block, key)
    leaves = (
        struct.pack("<BBBBIIIBB14x32x", 64, 0, 0, 0, 64, i, size, 0, 64) for i in range(size // 64)
    )
    return b"".join(blake2b(root, leaf) for leaf in leaves)


def test_the_slow_blake2b_is_blake2b():
    plain_block = struct.pack("<BBBB60x", 64, 3, 1, 1)
    expected = hashlib.blake2b(b"x" * 300, key=b"key").digest()
    assert blake2b(b"x" * 300, plain_block, b"key") == expected


def expanded(seed: bytes) -> Iterator[int]:
    """Expand a seed to c1: BLAKE2Xb keyed by the seed over a counter, 4096 bytes at a time."""
    multiple = WORD - WORD % MODULUS - 1
    for counter in range(1 << 32):
        block = blake2xb(struct.pack("<Q", counter), seed, 4096)
        yield from (word % MODULUS for word in struct.unpack("<512Q", block) if word < multiple)


def test_a_seed_expands_as_the_specification_says():
    ring = Ring(PLAIN_BITS)
    _, c1 = ring.residues(ring.seeded(np.zeros(RING_DEGREE, np.uint64), SEED))
    words = expanded(SEED)
    assert c1.tolist() == [next(words) for _ in range(RING_DEGREE)]


def test_known_answer_of_the_seed_expansion():
    ring = Ring(PLAIN_BITS)
    _, c1 = ring.residues(ring.seeded(np.zeros(RING_DEGREE, np.uint64), SEED))
    assert c1[:3].tolist() == [767746516062861584, 493202236469546801, 254328489486494054]
    digest = "64dd6556b31c086f428a09f6dec882f8fc569e522b38bd9f5e8e13f920eafd21"
    assert hashlib.sha256(c1.astype("<u8").tobytes()).hexdigest() == digest


def errors(c0: np.ndarray, c1: np.ndarray, message: np.ndarray) -> list[int]:
    """Return c0 + c1·s - round(q·m/t) modulo x^4096 + 1 and q, in Python integers."""
    product = np.convolve(c1.astype(object), SECRET.astype(object))
    product[: RING_DEGREE - 1] -= product[RING_DEGREE:]
    found = []
    for phase, m in zip(c0.astype(object) + product[:RING_DEGREE], message.tolist(), strict=True):
        scaled = (MODULUS * m + (1 << (PLAIN_BITS - 1))) >> PLAIN_BITS
        found.append((int(phase) - scaled + MODULUS // 2) % MODULUS - MODULUS // 2)
    return found


@pytest.mark.parametrize("fill", ["zero", "largest", "random"])
def test_a_ciphertext_is_the_message_and_noise_of_at_most_21(fill):
    largest = (1 << PLAIN_BITS) - 1
    message = {
        "zero": np.zeros(RING_DEGREE, np.uint64),
        "largest": np.full(RING_DEGREE, largest, np.uint64),
        "random": np.random.default_rng(0).integers(0, largest, RING_DEGREE, np.uint64),
    }[fill]
    ring = KeyedRing(PLAIN_BITS, SECRET)
    c0, seed = ring.encrypt(message)
    _, c1 = ring.residues(ring.seeded(c0, seed))
    noise = errors(c0, c1, message)
    assert max(map(abs, noise)) <= 21
    assert len(set(noise)) > 10  # it is noise


def test_the_same_message_never_encrypts_alike():
    ring = KeyedRing(PLAIN_BITS, SECRET)
    message = np.zeros(RING_DEGREE, np.uint64)
    (first, first_seed), (second, second_seed) = ring.encrypt(message), ring.encrypt(message)
    assert first_seed != second_seed
    assert (first != second).mean() > 0.99


@settings(max_examples=20, deadline=None)
@given(plain_bits=st.integers(20, 52), seed=st.integers(0, 2**32))
def test_what_is_encrypted_decrypts(plain_bits, seed):
    ring, coordinator = KeyedRing(plain_bits, SECRET), Ring(plain_bits)
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 1 << plain_bits, (2, RING_DEGREE), np.uint64)
    total = coordinator.seeded(*ring.encrypt(first))
    coordinator.add(total, coordinator.seeded(*ring.encrypt(second)))
    opened = ring.decrypt(ring.ciphertext(*coordinator.residues(total)))
    modulo_t = np.uint64((1 << plain_bits) - 1)
    np.testing.assert_array_equal(opened, (first + second) & modulo_t)


@pytest.mark.parametrize("capacity", [1, 4, 100, 1000, 10_000, 65_535])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_error_that_the_bound_allows_decrypts_exactly(capacity, sign):
    plain_bits = largest_plain_bits(capacity)
    ring = KeyedRing(plain_bits, SECRET)
    rng = np.random.default_rng(capacity)
    message = rng.integers(0, 1 << plain_bits, RING_DEGREE, np.uint64)
    message[:3] = 0, 1, (1 << plain_bits) - 1
    c0, seed = ring.encrypt(message)
    _, c1 = ring.residues(ring.seeded(c0, seed))
    bound = (capacity + 2) * HALF_UNITS // 2
    shift = np.uint64(sign * (bound - 22) % MODULUS)  # the fresh error is within ±21.5 of it
    shifted = (c0 + shift) % np.uint64(MODULUS)
    np.testing.assert_array_equal(ring.decrypt(ring.ciphertext(shifted, c1)), message)
    beyond = np.uint64(sign * ((MODULUS >> (plain_bits + 1)) + 23) % MODULUS)
    shifted = (c0 + beyond) % np.uint64(MODULUS)
    assert (ring.decrypt(ring.ciphertext(shifted, c1)) != message).all()


def test_another_secret_decrypts_to_noise():
    other = ternary_secret(RunKey(bytes(32)), bytes(16))
    message = np.zeros(RING_DEGREE, np.uint64)
    ring = KeyedRing(PLAIN_BITS, SECRET)
    c0, seed = ring.encrypt(message)
    stranger = KeyedRing(PLAIN_BITS, other)
    assert (stranger.decrypt(stranger.seeded(c0, seed)) != 0).all()


def test_a_private_file_serves_where_there_is_no_memory_file(monkeypatch, tmp_path):
    monkeypatch.delattr("os.memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ring = KeyedRing(PLAIN_BITS, SECRET)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 0  # the key has gone
    message = np.arange(RING_DEGREE, dtype=np.uint64)
    np.testing.assert_array_equal(ring.decrypt(ring.seeded(*ring.encrypt(message))), message)
    del ring
    assert not list(tmp_path.iterdir())
