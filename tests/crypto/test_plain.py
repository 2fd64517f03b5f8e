"""Protection `plain` against numpy, and what its coordinator refuses to add."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import MalformedChunk, NotFinite, UpdateContext, WeightOutOfRange
from crypto import plain as plain_protection

BODY = 60  # header and weight


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    count=st.sampled_from([1, 3, 32767, 32768, 32769]),
    scale=st.sampled_from([1e-38, 1e-3, 1.0, 1e37]),
)
def test_the_mean_is_numpys_float64_mean_rounded_once(seed, weights, count, scale):
    context = UpdateContext(bytes(16), 0, 0, count, 5, 1000, clip=1.0)
    rng = np.random.default_rng(seed)
    updates = [(rng.standard_normal(count) * scale).astype(np.float32) for _ in weights]
    total = plain_protection.accumulator(context)
    expected = np.zeros(count)
    for member, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        encoder = plain_protection.encoder(context, member, None, rng)
        total.add(member, io.BytesIO(b"".join(encoder.encode(update, weight))))
        expected += update.astype(np.float64) * weight
    encoded = io.BytesIO(b"".join(total.result()))
    opened = plain_protection.open_sum(context, None, total.members, encoded)
    np.testing.assert_array_equal(opened.mean, (expected / sum(weights)).astype(np.float32))
    assert opened.total_weight == sum(weights)


def test_the_largest_floats_do_not_overflow(plain):
    context = plain.context(capacity=3, weight_cap=(1 << 32) - 1)
    update = np.full(5000, np.finfo(np.float32).max)
    opened = plain.through(context, [update] * 3, [(1 << 32) - 1] * 3)
    np.testing.assert_array_equal(opened.mean, update)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    count=st.sampled_from([1, 3, 32767, 32768, 32769]),
)
def test_an_opened_sum_is_encoded_as_its_accumulator_would(seed, weights, count):
    context = UpdateContext(bytes(16), 3, 2, count, 5, 1000, clip=1.0)
    total = plain_protection.accumulator(context)
    rng = np.random.default_rng(seed)
    for member, weight in enumerate(weights):
        update = rng.standard_normal(count).astype(np.float32)
        encoder = plain_protection.encoder(context, member, None, rng)
        total.add(member, io.BytesIO(b"".join(encoder.encode(update, weight))))
    encoded = b"".join(total.result())
    opened = plain_protection.open_sum(context, None, total.members, io.BytesIO(encoded))
    again = plain_protection.encoded_sum(context, opened.count, opened.total_weight, opened.mean)
    assert b"".join(again) == encoded


def test_what_another_protection_opened_reads_the_same_in_plain(bench, plain, random_update):
    context = bench.context()
    opened = bench.through(context, [random_update() for _ in range(3)], [5, 60, 100])
    parts = plain_protection.encoded_sum(context, opened.count, opened.total_weight, opened.mean)
    again = plain.open(plain.context(), (0, 1, 2), b"".join(parts))
    np.testing.assert_array_equal(again.mean, opened.mean)
    assert (again.total_weight, again.count) == (opened.total_weight, opened.count)


def test_an_opened_sum_is_encoded_at_constant_memory(plain):
    context = plain.context(parameter_count=300_000)
    mean = np.ones(300_000, np.float32)
    sizes = [len(part) for part in plain_protection.encoded_sum(context, 1, 1, mean)]
    assert sum(sizes) == BODY + 4 * 300_000
    assert max(sizes) <= 1 << 17


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4999])
def test_an_upload_with_a_value_that_is_not_finite_changes_nothing(
    plain, random_update, bad, place
):
    context = plain.context()
    total = plain.total(context, plain.upload(context, 0, random_update(), 5))
    before = plain.summed(total)
    upload = bytearray(plain.upload(context, 1, random_update(), 5))
    struct.pack_into("<f", upload, BODY + 4 * place, bad)
    with pytest.raises(NotFinite):
        total.add(1, io.BytesIO(bytes(upload)))
    assert total.members == (0,)
    assert plain.summed(total) == before


@pytest.mark.parametrize("weight", [0, 101, (1 << 64) - 1])
def test_an_upload_with_a_weight_out_of_range_changes_nothing(plain, random_update, weight):
    context = plain.context()
    total = plain.protection.accumulator(context)
    upload = bytearray(plain.upload(context, 1, random_update(), 5))
    struct.pack_into("<Q", upload, 52, weight)
    with pytest.raises(WeightOutOfRange):
        total.add(1, io.BytesIO(bytes(upload)))
    assert total.members == ()


@pytest.mark.parametrize(
    ("offset", "bad"),
    [
        (BODY, struct.pack("<f", np.nan)),
        (BODY + 4 * 4999, struct.pack("<f", np.inf)),
        (52, struct.pack("<Q", 0)),
        (52, struct.pack("<Q", 101)),
    ],
)
def test_a_sum_that_no_coordinator_can_have_made_is_refused(plain, random_update, offset, bad):
    context = plain.context()
    encoded = bytearray(
        plain.summed(plain.total(context, plain.upload(context, 0, random_update(), 5)))
    )
    encoded[offset : offset + len(bad)] = bad
    with pytest.raises(MalformedChunk):
        plain.open(context, (0,), bytes(encoded))


def test_plain_works_where_tenseal_is_not_installed():
    program = """
import io, sys
sys.modules["tenseal"] = sys.modules["backports.zstd"] = None
import numpy as np
import crypto
context = crypto.UpdateContext(bytes(16), 0, 0, 3, 1, 1, 1.0)
plain = crypto.protection("plain")
total = plain.accumulator(context)
update = np.float32([1, 2, 3])
encoder = plain.encoder(context, 0, None, np.random.default_rng())
total.add(0, io.BytesIO(b"".join(encoder.encode(update, 1))))
opened = plain.open_sum(context, None, [0], io.BytesIO(b"".join(total.result())))
assert (opened.mean == update).all()
try:
    crypto.protection("encrypted")
except crypto.BackendMissing as missing:
    print(missing)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("TenSEAL and Zstandard: expected both installed")
