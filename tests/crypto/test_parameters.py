"""The arithmetic of exactness, in rationals, for every capacity."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto import BfvParameters, InvalidContext, PlainParameters, UpdateContext
from crypto.parameters import MODULUS, largest_plain_bits

CONTEXT = UpdateContext(bytes(range(16)), 7, 1, 5000, 100, 1000, clip=0.5)
NOISE = 21 + Fraction(1, 2) + Fraction(2 ** (4 - 1))  # SEAL's, rounding, dropped bits


def is_prime(number: int) -> bool:
    """Miller and Rabin, deterministic below 3.3e24 (Sorenson and Webster, arXiv 1509.00864)."""
    odd = number - 1
    twos = (odd & -odd).bit_length() - 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        power = pow(base, odd >> twos, number)
        if power not in (1, odd) and odd not in [pow(power, 1 << i, number) for i in range(twos)]:
            return False
    return True


def test_the_modulus_is_the_largest_60_bit_prime_for_the_ring():
    candidates = range(1 << 60, 0, -2 * 4096)
    assert next(c + 1 for c in candidates if c + 1 < 1 << 60 and is_prime(c + 1)) == MODULUS


@given(st.integers(1, 65_535))
def test_the_plaintext_modulus_is_the_largest_that_is_exact(capacity):
    bits = largest_plain_bits(capacity)
    assert (capacity + 2) * NOISE < Fraction(MODULUS, 2 * 2**bits)
    assert not (capacity + 2) * NOISE < Fraction(MODULUS, 2 * 2 ** (bits + 1))


@given(st.integers(1, 65_535), st.sampled_from([8, 16]))
def test_no_field_of_any_sum_carries_into_the_next(capacity, bits):
    try:
        p = BfvParameters.derive(replace(CONTEXT, capacity=capacity, update_bits=bits))
    except InvalidContext:
        return
    assert capacity * 2 * p.half_levels < 2**p.field_bits
    assert p.values_per_coefficient * p.field_bits <= p.plain_bits
    assert p.half_levels < 2**23  # exact in float32
    assert p.half_levels == 2**23 - 1 or capacity * 2 * (p.half_levels + 1) >= 2**p.field_bits


@pytest.mark.parametrize(
    ("capacity", "bits", "plain_bits", "levels"),
    [
        (10, 16, 50, 3_355_443),
        (100, 16, 47, 83_887),
        (100, 8, 47, 327),
        (1000, 16, 44, 4195),
        (10_000, 16, 40, 105),
    ],
)
def test_known_parameters(capacity, bits, plain_bits, levels):
    p = BfvParameters.derive(replace(CONTEXT, capacity=capacity, update_bits=bits))
    assert (p.plain_bits, 2 * p.half_levels + 1) == (plain_bits, levels)


def test_known_parameters_ids():
    assert PlainParameters(CONTEXT).id.hex() == "7f6165a057c044f830120b6ee1084bc7"
    assert BfvParameters.derive(CONTEXT).id.hex() == "97769d515d683c856a6f0a9440be0793"
    cohort = replace(CONTEXT, cohort=bytes(range(32)))
    assert BfvParameters.derive(cohort, "masked").id.hex() == "9b4f559f428569d30a11ba80eeb0de1d"
    assert BfvParameters.derive(cohort, "sealed").id.hex() == "a652d07b56c8fd5c0147377e6418ef1b"


@pytest.mark.parametrize("protection", ["masked", "encrypted", "sealed"])
def test_masks_go_with_a_cohort(protection):
    cohort = bytes(32) if protection == "encrypted" else b""
    with pytest.raises(InvalidContext):
        BfvParameters.derive(replace(CONTEXT, cohort=cohort), protection)
    with pytest.raises(InvalidContext):
        replace(CONTEXT, cohort=bytes(31))


@pytest.mark.parametrize(
    "change",
    [
        {"parameter_count": 5001},
        {"capacity": 99},
        {"weight_cap": 999},
        {"clip": 0.25},
        {"update_bits": 8},
    ],
)
def test_every_parameter_that_matters_is_in_the_id(change):
    ours = BfvParameters.derive(CONTEXT)
    assert BfvParameters.derive(replace(CONTEXT, **change)).id != ours.id


def test_clips_that_are_one_float32_are_one_parameter():
    as_float32 = replace(CONTEXT, clip=0.10000000149011612)
    tenth = replace(CONTEXT, clip=0.1)
    assert BfvParameters.derive(tenth).id == BfvParameters.derive(as_float32).id


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-30, 1e300])
def test_a_clip_that_cannot_scale_is_refused(clip):
    with pytest.raises(InvalidContext):
        BfvParameters.derive(replace(CONTEXT, clip=clip))


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 10_000, "update_bits": 8},  # fields too narrow
        {"capacity": 65_535, "weight_cap": 2**32 - 1},  # the weights could wrap
        {"capacity": 10_000, "parameter_count": 2**31},  # the saturated values could wrap
    ],
)
def test_what_cannot_be_exact_is_refused(change):
    with pytest.raises(InvalidContext):
        BfvParameters.derive(replace(CONTEXT, **change))


@given(st.integers(1, 2**31), st.sampled_from([8, 16]))
def test_chunks_cover_the_update_and_nothing_else(count, bits):
    p = BfvParameters.derive(replace(CONTEXT, parameter_count=count, update_bits=bits))
    room = p.coefficients * p.values_per_coefficient
    assert count <= room < count + p.values_per_coefficient * 4096
    sizes = {p.chunk_ciphertexts(c) for c in range(p.value_chunks - 1)} if count < 10**7 else {32}
    assert sizes <= {32}
    whole = (p.value_chunks - 1) * 32
    assert whole + p.chunk_ciphertexts(p.value_chunks - 1) == p.ciphertexts
    counters = p.chunk_ciphertexts(p.value_chunks)
    assert counters * 4096 >= 16 + 2 * (p.value_chunks + 1)
    assert counters == 1 or count > 5 * 10**8


@pytest.mark.parametrize(("bits", "most"), [(16, 3.6), (8, 2.4)])
def test_an_upload_is_smaller_than_float32(bits, most):
    from crypto import protection

    context = replace(CONTEXT, parameter_count=1_000_000, update_bits=bits)
    total = protection("encrypted").accumulator(context)
    assert total.encoded_update_size / 1_000_000 < most
