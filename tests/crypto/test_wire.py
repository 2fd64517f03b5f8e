"""Planes and headers."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto import MalformedChunk, UpdateContext, WrongContext
from crypto.parameters import MODULUS
from crypto.wire import (
    HEADER_SIZE,
    Binding,
    Kind,
    add_nibbles,
    centred,
    check_residues,
    check_size,
    fill,
    nibbles_of,
    planes_of,
    words_of,
)

CONTEXT = UpdateContext(bytes(range(16)), 0x01020304, 0x0506, 10, 5, 1, 1.0)
BINDING = Binding.of(CONTEXT, Kind.ENCRYPTED_UPDATE, 0x0708, bytes(range(16, 32)))

words = st.lists(st.integers(0, (1 << 60) - 1), min_size=1, max_size=20).map(
    lambda values: np.array(values + values, np.uint64)
)


@given(words)
def test_planes_and_nibbles_together_lose_nothing(values):
    n = len(values)
    planes, nibbles = memoryview(bytearray(7 * n)), memoryview(bytearray(n // 2))
    for span in (slice(0, n - 2), slice(n - 2, n)):  # in two parts
        planes_of(values[span], planes, span, n)
        nibbles_of(values[span], nibbles, span)
    for span in (slice(0, n), slice(n - 2, n)):
        back = words_of(planes, span, n)
        np.testing.assert_array_equal(back, values[span] >> np.uint64(4) << np.uint64(4))
        add_nibbles(back, nibbles, span)
        np.testing.assert_array_equal(back, values[span])


def test_planes_are_laid_out_as_documented():
    values = np.array([0x0FEDCBA987654321, 0x0123456789ABCDEF], np.uint64)
    planes, nibbles = memoryview(bytearray(14)), memoryview(bytearray(1))
    planes_of(values, planes, slice(0, 2), 2)
    nibbles_of(values, nibbles, slice(0, 2))
    assert planes.hex() == "32547698debc9a78" + "badc" + "5634" + "fe" + "12"
    assert nibbles.hex() == "f1"


@given(st.lists(st.integers(0, MODULUS - 1), min_size=1, max_size=20))
def test_dropping_bits_moves_a_residue_by_at_most_8(values):
    residues = np.array(values, np.uint64)
    planes = memoryview(bytearray(7 * len(values)))
    whole = slice(0, len(values))
    planes_of(residues, planes, whole, len(values))
    received = centred(words_of(planes, whole, len(values)))
    for sent, got in zip(values, received.tolist(), strict=True):
        assert got < MODULUS
        assert min((got - sent) % MODULUS, (sent - got) % MODULUS) <= 8


def test_any_word_becomes_a_residue():
    received = centred(words_of(memoryview(b"\xff" * 7), slice(0, 1), 1))
    assert received.tolist() == [((1 << 60) - 16 + 8) % MODULUS]


def test_residues_end_at_the_modulus():
    check_residues(np.array([0, MODULUS - 1], np.uint64), "c0")
    with pytest.raises(MalformedChunk):
        check_residues(np.array([0, MODULUS], np.uint64), "c0")


def test_known_answer_of_the_header():
    assert BINDING.header(0x090A, 32).hex() == (
        "46444c4d" + "01" + "03" + "0807" + "04030201" + "0605" + "2000" + "0a090000"
        "101112131415161718191a1b1c1d1e1f" + "000102030405060708090a0b0c0d0e0f"
    )


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"kind": Kind.ENCRYPTED_SUM}, "kind"),
        ({"member_or_count": 1}, "member or count"),
        ({"round": 1}, "round"),
        ({"attempt": 1}, "attempt"),
        ({"parameters_id": bytes(16)}, "parameters id"),
        ({"run_id": bytes(16)}, "run id"),
    ],
)
def test_a_header_of_something_else_names_the_first_field_that_differs(change, subject):
    with pytest.raises(WrongContext) as refusal:
        BINDING.check(replace(BINDING, **change).header(3, 32), 3, 32)
    assert refusal.value.subject == subject


@given(st.integers(0, HEADER_SIZE - 1), st.integers(1, 255))
def test_no_byte_of_a_header_may_differ(place, change):
    header = bytearray(BINDING.header(3, 32))
    BINDING.check(bytes(header), 3, 32)
    header[place] ^= change
    with pytest.raises((MalformedChunk, WrongContext)):
        BINDING.check(bytes(header), 3, 32)


class _Dripping(io.BytesIO):
    """A file that gives one byte at a time."""

    def readinto(self, buffer: memoryview, /) -> int:
        return super().readinto(buffer[:1])


def test_a_file_may_give_less_than_it_is_asked_for():
    buffer = memoryview(bytearray(5))
    fill(_Dripping(b"12345"), buffer)
    assert bytes(buffer) == b"12345"
    with pytest.raises(MalformedChunk):
        fill(_Dripping(b"1234"), buffer)


def test_a_file_of_another_size_is_refused():
    check_size(io.BytesIO(b"12345"), 5)
    for size in (0, 4, 6, 1 << 40):
        with pytest.raises(MalformedChunk):
            check_size(io.BytesIO(b"12345"), size)
