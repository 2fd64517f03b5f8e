"""Exact sums of real ciphertexts, against a slow oracle, and what opening refuses."""

import io
import math
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import (
    BfvParameters,
    CryptoError,
    MalformedChunk,
    OpeningFailed,
    RunKey,
    TagMismatch,
    UpdateContext,
    WrongContext,
)
from crypto import encrypted as encrypted_protection
from crypto.bfv import KeyedRing
from crypto.parameters import MODULUS
from crypto.run_key import ternary_secret
from crypto.tags import Tagger
from crypto.wire import Binding, Kind, nibbles_of, planes_of

RUN_KEY = RunKey(bytes(range(32)))
HEADER, RING = 52, 4096


def context_of(**changes):
    fields = {"parameter_count": 5000, "capacity": 100, "weight_cap": 1, "clip": 0.5}
    return UpdateContext(bytes(range(16)), 7, 1, **(fields | changes))


def upload(context, member, update, weight, rng):
    encoder = encrypted_protection.encoder(context, member, RUN_KEY, rng)
    return b"".join(encoder.encode(update, weight))


def open_sum(context, members, encoded, run_key=RUN_KEY):
    return encrypted_protection.open_sum(context, run_key, members, io.BytesIO(encoded))


def slow_level(value, weight, draw, parameters):
    """Round one value as codec's docstring says, in float32 scalars and Python integers."""
    h, cap = parameters.half_levels, parameters.context.weight_cap
    clip = np.float32(parameters.clip)
    z = max(-clip, min(clip, value)) * np.float32(h / parameters.clip * (weight / cap))
    limit = np.float32(h * (weight / cap))
    z = max(-limit, min(limit, z))
    floor = math.floor(z)
    return floor + int(draw < np.float32(z - np.float32(floor)))


@settings(max_examples=25, deadline=None)
@given(
    count=st.sampled_from([1, 40, 4097, 5000]),
    bits=st.sampled_from([8, 16]),
    capacity=st.integers(1, 1000),
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    deviation=st.sampled_from([1e-6, 0.1, 10.0]),
)
def test_the_opened_sum_is_the_integer_sum_bit_for_bit(
    count, bits, capacity, weights, seed, deviation
):
    context = context_of(
        parameter_count=count,
        capacity=max(capacity, len(weights)),
        weight_cap=50,
        update_bits=bits,
    )
    parameters = BfvParameters.derive(context)
    values = np.random.default_rng(seed)
    total = encrypted_protection.accumulator(context)
    integers, saturated = [0] * count, 0
    for member, weight in enumerate(weights):
        update = (values.standard_normal(count) * deviation).astype(np.float32)
        encoded = upload(context, member, update, weight, np.random.default_rng(member))
        total.add(member, io.BytesIO(encoded))
        draws = np.random.default_rng(member).random(count, dtype=np.float32)
        for i, (value, draw) in enumerate(zip(update, draws, strict=True)):
            integers[i] += slow_level(value, weight, draw, parameters)
            saturated += abs(value) > np.float32(0.5)
    opened = open_sum(context, total.members, b"".join(total.result()))
    scale = (0.5 * 50) / (parameters.half_levels * sum(weights))
    expected = np.array([np.float32(integer * scale) for integer in integers])
    np.testing.assert_array_equal(opened.mean.view(np.uint32), expected.view(np.uint32))
    assert (opened.total_weight, opened.saturated, opened.count) == (
        sum(weights),
        saturated,
        len(weights),
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("values", ["largest", "smallest", "alternating", "random"])
def test_a_full_sum_of_extreme_values_is_exact(bits, values):
    """100 of 100 real ciphertexts: with clip = h, the opened sum is the integers themselves."""
    h = BfvParameters.derive(context_of(update_bits=bits)).half_levels
    context = context_of(update_bits=bits, clip=float(h))
    rng = np.random.default_rng(0)
    total, sums = encrypted_protection.accumulator(context), np.zeros(5000, np.int64)
    for member in range(100):
        levels = {
            "largest": np.full(5000, h),
            "smallest": np.full(5000, -h),
            "alternating": np.where(np.arange(5000) % 2, h, -h),
            "random": rng.integers(-h, h + 1, 5000),
        }[values]
        encoded = upload(context, member, levels.astype(np.float32), 1, rng)
        total.add(member, io.BytesIO(encoded))
        sums += levels
    opened = open_sum(context, total.members, b"".join(total.result()))
    np.testing.assert_array_equal(opened.mean, (sums / 100).astype(np.float32))
    np.testing.assert_array_equal(np.round(opened.mean.astype(np.float64) * 100), sums)
    assert (opened.total_weight, opened.saturated, opened.count) == (100, 0, 100)


def test_the_order_of_the_updates_never_shows(encrypted, random_update):
    context = encrypted.context()
    uploads = [encrypted.upload(context, i, random_update(seed=i), 3) for i in range(3)]
    sums = []
    for order in ([0, 1, 2], [2, 0, 1]):
        total = encrypted.protection.accumulator(context)
        for member in order:
            total.add(member, io.BytesIO(uploads[member]))
        sums.append(encrypted.summed(total))
    assert sums[0] == sums[1]


def test_totals_of_several_threads_do_not_meet(encrypted, random_update):
    context = encrypted.context()
    uploads = [encrypted.upload(context, i, random_update(seed=i), 3) for i in range(4)]
    alone = encrypted.summed(encrypted.total(context, *uploads))
    with ThreadPoolExecutor(4) as threads:
        sums = threads.map(
            lambda _: encrypted.summed(encrypted.total(context, *uploads)), range(16)
        )
        assert set(sums) == {alone}


def test_values_beyond_the_clip_saturate_and_are_counted(encrypted):
    context = encrypted.context(parameter_count=6, clip=0.5)
    inside, outside = np.nextafter(np.float32(0.5), np.float32([0, 1]))
    update = np.array([0.5, -0.5, inside, outside, -7, 3e38], np.float32)
    opened = encrypted.through(context, [update, update], [100, 1])
    assert opened.saturated == 6
    expected = np.array([0.5, -0.5, 0.5, 0.5, -0.5, 0.5], np.float32)
    np.testing.assert_allclose(opened.mean, expected, rtol=1e-6)


def test_zero_stays_zero(encrypted):
    opened = encrypted.through(encrypted.context(), [np.zeros(5000, np.float32)] * 3, [1, 2, 3])
    assert not opened.mean.any()


def test_another_run_key_opens_nothing(encrypted, random_update):
    context = encrypted.context()
    upload = encrypted.upload(context, 0, random_update(), 5)
    encoded = encrypted.summed(encrypted.total(context, upload))
    for other in (RunKey(bytes(32)), RunKey(bytes(range(31)) + b"\0")):
        with pytest.raises(OpeningFailed):
            open_sum(context, (0,), encoded, other)


def test_an_update_made_with_another_run_key_makes_the_sum_unopenable(encrypted, random_update):
    context = encrypted.context()
    stranger = encrypted_protection.encoder(context, 1, RunKey(bytes(32)), np.random.default_rng())
    foreign = b"".join(stranger.encode(random_update(), 1))
    total = encrypted.total(context, encrypted.upload(context, 0, random_update(), 5), foreign)
    with pytest.raises(OpeningFailed):
        encrypted.open(context, (0, 1), encrypted.summed(total))


CHUNK = HEADER + RING * 29 // 2  # of a sum: header, c0 and c1 planes, c1 nibbles


@pytest.mark.parametrize(
    ("offset", "new", "refusal", "subject"),
    [
        (HEADER, b"\xff" * 7 * RING, MalformedChunk, "residues of c0"),
        (HEADER + 7 * RING, b"\xff" * (7 * RING + RING // 2), MalformedChunk, "residues of c1"),
        (CHUNK + HEADER, b"\xff" * 7 * RING, MalformedChunk, "residues of c0"),
        (CHUNK + 6, b"\2\0", WrongContext, "member or count"),
        (CHUNK + 16, b"\1\0\0\0", MalformedChunk, "chunk index and ciphertexts"),
        (HEADER, bytes(14 * RING), TagMismatch, "tags of chunk 1"),
        (HEADER + 7 * RING, bytes(7 * RING + RING // 2), TagMismatch, "tags of chunk 1"),
        (CHUNK + HEADER + 7 * RING, bytes(7 * RING), TagMismatch, "tags of chunk 0"),
    ],
)
def test_a_sum_that_was_tampered_with_is_refused(
    encrypted, random_update, offset, new, refusal, subject
):
    context = encrypted.context()
    upload = encrypted.upload(context, 0, random_update(), 5)
    encoded = bytearray(encrypted.summed(encrypted.total(context, upload)))
    assert len(encoded) == 2 * CHUNK
    encoded[offset : offset + len(new)] = new
    with pytest.raises(refusal) as refused:
        encrypted.open(context, (0,), bytes(encoded))
    assert refused.value.subject == subject


def test_the_largest_residues_are_accepted_and_the_next_is_not(encrypted, random_update):
    """q - 1 is a residue: it opens to nonsense, and q is refused before it is opened."""
    context = encrypted.context()
    upload = encrypted.upload(context, 0, random_update(), 5)
    encoded = bytearray(encrypted.summed(encrypted.total(context, upload)))
    for largest, refusal in ((MODULUS - 1, OpeningFailed), (MODULUS, MalformedChunk)):
        words = np.full(RING, largest, np.uint64)
        whole = slice(0, RING)
        planes_of(words, memoryview(encoded)[HEADER + 7 * RING :], whole, RING)
        nibbles_of(words, memoryview(encoded)[HEADER + 14 * RING :], whole)
        with pytest.raises(refusal):
            encrypted.open(context, (0,), bytes(encoded))


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 0), (0, 2), (1, 0), (1, 101), (2, 5001), (3, 0), (3, 2), (15, 1), (20, 1), (4095, 1)],
)
def test_counters_that_no_member_can_have_sent_are_refused(encrypted, place, value):
    """Even where a member made the tags for them."""
    context = encrypted.context()
    counters = np.zeros(RING, np.uint64)
    counters[:4] = 1, 5, 0, 1
    assert _opened(context, counters, np.zeros(RING, np.uint64)).total_weight == 5
    counters[place] = value
    with pytest.raises(OpeningFailed):
        _opened(context, counters, np.zeros(RING, np.uint64))


def test_values_that_no_update_can_hold_are_refused(encrypted):
    context = encrypted.context()
    p = BfvParameters.derive(context)
    counters = np.zeros(RING, np.uint64)
    counters[:4] = 1, 5, 0, 1
    for place, value in (
        (0, 2 * p.half_levels + 1),
        (0, (2 * p.half_levels + 1) << p.field_bits),
        (5000 - 4096, 1 << p.field_bits),  # the first field without a value
        (0, 1 << (2 * p.field_bits)),
    ):
        values = np.zeros(RING, np.uint64)
        values[place] = value
        with pytest.raises(OpeningFailed):
            _opened(context, counters, values)


def _opened(context, counters, values):
    """Open a sum of one update whose coefficients are these, rightly tagged."""
    parameters = BfvParameters.derive(context)
    ring = KeyedRing(parameters.plain_bits, ternary_secret(RUN_KEY, context.run_id))
    binding = Binding.of(context, Kind.ENCRYPTED_SUM, 1, parameters.id)
    chunks = iter([(0, values.copy()), (1, counters.copy())])
    tagged = list(Tagger(parameters, RUN_KEY).tagged(chunks, 0))
    encoded = b""
    for chunk, coefficients in reversed(tagged):
        c0, c1 = ring.residues(ring.seeded(*ring.encrypt(coefficients)))
        body = memoryview(bytearray(14 * RING + RING // 2))
        whole = slice(0, RING)
        planes_of(c0, body, whole, RING)
        planes_of(c1, body[7 * RING :], whole, RING)
        nibbles_of(c1, body[14 * RING :], whole)
        encoded += binding.header(chunk, 1) + body
    return open_sum(context, (0,), encoded)


def test_every_chunk_of_an_upload_is_checked(random_update):
    """Three chunks: a wrong header in the last changes nothing of the first."""
    context = context_of(parameter_count=300_000, capacity=2)
    rng = np.random.default_rng(0)
    first, second = (upload(context, i, random_update(300_000), 1, rng) for i in range(2))
    total = encrypted_protection.accumulator(context)
    total.add(0, io.BytesIO(first))
    before = b"".join(total.result())
    size = HEADER + 64 + 7 * RING  # the last chunk holds the counters' one ciphertext
    for start in (len(second) - size, HEADER + 32 * (64 + 7 * RING)):
        for offset in range(HEADER):
            bad = bytearray(second)
            bad[start + offset] ^= 1
            with pytest.raises((MalformedChunk, WrongContext)):
                total.add(1, io.BytesIO(bytes(bad)))
    assert b"".join(total.result()) == before


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbage_is_refused_with_a_type_or_opens_to_an_error(data):
    """Any bytes of the right length, with a right header or not: typed, and no crash."""
    context = context_of(parameter_count=10, capacity=1)
    parameters = BfvParameters.derive(context)
    total = encrypted_protection.accumulator(context)
    seed = data.draw(st.integers(0, 2**32))
    encoded = bytearray(np.random.default_rng(seed).bytes(2 * CHUNK))
    if data.draw(st.booleans()):
        binding = Binding.of(context, Kind.ENCRYPTED_SUM, 1, parameters.id)
        encoded[:HEADER] = binding.header(1, 1)
        encoded[CHUNK : CHUNK + HEADER] = binding.header(0, 1)
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 51, 52, CHUNK]))
    encoded = encoded[: len(encoded) - cut]
    with pytest.raises(CryptoError):
        open_sum(context, (0,), bytes(encoded))
    with pytest.raises((MalformedChunk, WrongContext)):
        total.add(0, io.BytesIO(bytes(encoded)))
    assert total.members == ()


def test_any_body_behind_right_headers_is_an_update(encrypted, random_update):
    """Every seed and every 56-bit word is valid: there is nothing in a body to exploit."""
    context = encrypted.context()
    good = encrypted.upload(context, 0, random_update(), 5)
    size = HEADER + 64 + 7 * RING
    for body in (b"\xff" * (size - HEADER), bytes(size - HEADER)):
        bad = good[:HEADER] + body + good[size : size + HEADER] + body
        total = encrypted.total(context, bad)
        with pytest.raises(OpeningFailed):
            encrypted.open(context, (0,), encrypted.summed(total))


def test_the_coordinators_memory_does_not_grow_with_the_number_of_updates():
    program = """
import io, resource
import numpy as np
import crypto
context = crypto.UpdateContext(bytes(16), 0, 0, 1_000_000, 100, 1, 1.0)
encrypted = crypto.protection("encrypted")
encoder = encrypted.encoder(context, 0, crypto.RunKey(bytes(32)), np.random.default_rng())
upload = bytearray(b"".join(encoder.encode(np.zeros(1_000_000, np.float32), 1)))
headers = [upload.find(b"FDLM")]
while headers[-1] >= 0:
    headers.append(upload.find(b"FDLM", headers[-1] + 1))
total = encrypted.accumulator(context)
for member in range(12):
    for header in headers[:-1]:
        upload[header + 6] = member
    total.add(member, io.BytesIO(upload))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    peaks = [int(line) for line in done.stdout.split()]  # KiB
    assert peaks[-1] - peaks[2] < 2048


def test_an_upload_carries_neither_the_key_nor_the_values(encrypted, random_update):
    update = random_update()
    encoded = encrypted.upload(encrypted.context(), 0, update, 77)
    assert RUN_KEY.secret not in encoded
    assert update[:8].tobytes() not in encoded
    assert struct.pack("<Q", 77) not in encoded[:HEADER]
