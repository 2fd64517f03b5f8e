"""Rounding without bias, and packing without loss."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import BfvParameters, UpdateContext
from crypto.codec import pack, quantise, unpack

CONTEXT = UpdateContext(bytes(16), 0, 0, 9000, 100, 100, clip=0.5)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("value", [0.3, -0.3, 1e-7, -1e-7, 0.49999])
@pytest.mark.parametrize("weight", [100, 37])
def test_rounding_has_no_bias(bits, value, weight):
    p = BfvParameters.derive(replace(CONTEXT, update_bits=bits))
    draws = 200_000
    levels, _ = quantise(p, np.full(draws, value, np.float32), weight, np.random.default_rng(bits))
    exact = float(np.float32(value)) * p.half_levels / 0.5 * weight / 100
    assert set(levels.astype(int) - p.half_levels) <= {np.floor(exact), np.floor(exact) + 1}
    standard_error = 0.5 / np.sqrt(draws)
    float32_error = abs(exact) * 2.0**-23
    bias = levels.mean() - p.half_levels - exact
    assert abs(bias) < 5 * standard_error + float32_error


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 1000),
    weight=st.integers(1, 100),
    clip=st.floats(2**-20, 2**20, width=32),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50),
    bits=st.sampled_from([8, 16]),
)
def test_levels_stay_in_range_whatever_the_values(capacity, weight, clip, values, bits):
    p = BfvParameters.derive(replace(CONTEXT, capacity=capacity, clip=clip, update_bits=bits))
    block = np.array(values, np.float32)
    levels, saturated = quantise(p, block, weight, np.random.default_rng(0))
    assert (levels <= 2 * p.half_levels).all()
    assert saturated == sum(abs(value) > clip for value in values)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_clip_is_the_outermost_level_and_never_rounds(bits, sign):
    p = BfvParameters.derive(replace(CONTEXT, update_bits=bits))
    block = np.full(1000, sign * 0.5, np.float32)
    levels, saturated = quantise(p, block, 100, np.random.default_rng(0))
    assert set(levels.tolist()) == {p.half_levels + sign * p.half_levels}
    assert saturated == 0


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("count", [1, 4096, 9000, 12288, 400_000])
def test_what_is_packed_unpacks_in_its_place(bits, count):
    p = BfvParameters.derive(replace(CONTEXT, parameter_count=count, update_bits=bits))
    p = replace(p, clip=float(p.half_levels))  # a level is 1: integers pass unchanged
    rng = np.random.default_rng(0)
    update = rng.integers(-p.half_levels, p.half_levels + 1, count).astype(np.float32)
    opened = np.empty(count, np.float32)
    for chunk in range(p.value_chunks):
        start = chunk * 32 * 4096
        span = slice(start, start + p.chunk_ciphertexts(chunk) * 4096)
        packed, saturated = pack(p, update, 100, span, rng)
        assert saturated == 0
        assert packed.max() < 1 << p.plain_bits
        unpack(p, packed, span, 1, 100, opened)
    np.testing.assert_array_equal(opened, update)


def test_values_lie_in_planes():
    p = BfvParameters.derive(CONTEXT)
    update = np.zeros(9000, np.float32)
    update[[0, 8192]] = 0.5
    packed, _ = pack(p, update, 100, slice(0, 8192), np.random.default_rng(0))
    h, f = p.half_levels, p.field_bits
    assert packed[0] == 2 * h | 2 * h << f
    assert packed[1] == h | h << f
    assert packed[9000 - 8192] == h  # there is no value 9000: its field is zero
