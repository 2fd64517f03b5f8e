"""The forms of a `plain` update: sizes from the context, sums of whole ones, hostile bytes."""

import io
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import (
    InvalidContext,
    InvalidUpdate,
    MalformedChunk,
    NotFinite,
    SpoiledTotal,
    UpdateContext,
    WrongContext,
    plain,
)
from crypto.parameters import BfvParameters

BODY = 60
LIMITS = [1, 5, 511, 512, 513, 1024, 32767, 32768, 32769, 70_000]


def context(count, **form):
    return UpdateContext(bytes(16), 0, 0, count, 5, 1000, clip=1.0, **form)


def upload(of, update, weight=1, member=0, seed=0):
    encoder = plain.encoder(of, member, None, np.random.default_rng(seed))
    encoded = b"".join(encoder.encode(update, weight))
    assert len(encoded) == encoder.encoded_size == plain.accumulator(of).encoded_update_size
    return encoded


def opened(of, uploads):
    total = plain.accumulator(of)
    for member, encoded in enumerate(uploads):
        total.add(member, io.BytesIO(encoded))
    return plain.open_sum(of, None, total.members, io.BytesIO(b"".join(total.result()))).mean


def thin(rng, length, kept):
    """Return values of which at most `kept` are not 0."""
    values = np.zeros(length, np.float32)
    values[rng.permutation(length)[:kept]] = rng.standard_normal(kept)
    return values


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    limit=st.sampled_from(LIMITS),
    tail=st.integers(0, 3),
    share=st.sampled_from([1e-9, 0.1, 0.5, 1.0]),
)
def test_listed_updates_have_the_mean_of_whole_ones(seed, weights, limit, tail, share):
    rng = np.random.default_rng(seed)
    listed = max(1, int(share * limit))
    of = context(limit + tail, tail_length=tail, listed=listed)
    updates = [
        np.concatenate([thin(rng, limit, rng.integers(0, listed + 1)), rng.random(tail)]).astype(
            np.float32
        )
        for _ in weights
    ]
    rows = [upload(of, *pair, member) for member, pair in enumerate(zip(updates, weights))]  # noqa: B905
    assert {len(row) for row in rows} == {BODY + 8 * listed + 4 * tail}
    expected = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True))
    np.testing.assert_array_equal(opened(of, rows), (expected / sum(weights)).astype(np.float32))


def by_the_book(encoded, limit, tail):
    """README's formula, value by value."""
    groups = -(-limit // 512)
    scales = struct.unpack_from(f"<{groups}f", encoded, BODY)
    levels = struct.unpack_from(f"<{limit}b", encoded, BODY + 4 * groups)
    rest = struct.unpack_from(f"<{tail}f", encoded, BODY + 4 * groups + limit)
    return np.array([scales[i // 512] * y / 127 for i, y in enumerate(levels)] + list(rest))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    limit=st.sampled_from(LIMITS),
    tail=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1e-45, 1e-38, 1e-3, 1.0, 3e38]),
)
def test_quantised_updates_have_the_mean_of_what_their_bytes_say(seed, weights, limit, tail, scale):
    rng = np.random.default_rng(seed)
    of = context(limit + tail, tail_length=tail, quantised=True)
    updates = [(rng.uniform(-1, 1, limit + tail) * scale).astype(np.float32) for _ in weights]
    rows, expected = [], np.zeros(limit + tail)
    for member, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        row = upload(of, update, weight, member, seed)
        assert len(row) == BODY + 4 * -(-limit // 512) + limit + 4 * tail
        said = by_the_book(row, limit, tail)
        bounds = np.repeat([np.abs(g).max() for g in _groups(update[:limit])], 512)[:limit]
        assert (np.abs(said[:limit] - update[:limit]) <= bounds * (1 + 1e-6) / 127).all()
        np.testing.assert_array_equal(said[limit:], update[limit:])
        rows.append(row)
        expected += weight * said
    np.testing.assert_array_equal(opened(of, rows), (expected / sum(weights)).astype(np.float32))


def _groups(values):
    return [values[start : start + 512] for start in range(0, len(values), 512)]


def test_levels_are_right_on_average_and_the_largest_value_is_exact():
    """Alistarh et al., lemma 3.1 (i): 2,000 draws, 6 sigma of a level's rounding."""
    update = np.float32([1.0, -1.0, 0.5, 0.0031, -0.7203, 0.0])
    of = context(6, quantised=True)
    draws = np.array([by_the_book(upload(of, update, seed=s), 6, 0) for s in range(2000)])
    np.testing.assert_array_equal(draws[:, [0, 1, 5]], np.tile([1.0, -1.0, 0.0], (2000, 1)))
    sigma = 0.5 / 127 / np.sqrt(2000)
    assert (np.abs(draws.mean(0) - update) < 6 * sigma + 1e-9).all()


LISTED = context(9, tail_length=2, listed=3)
QUANTISED = context(1030, tail_length=2, quantised=True)
TAIL_OF_LISTED, LEVELS = BODY + 24, BODY + 12


def _listed(*places):
    return struct.pack("<3I", *places)


@pytest.mark.parametrize(
    ("of", "offset", "bad", "error"),
    [
        (LISTED, BODY, _listed(0, 2, 2), MalformedChunk),
        (LISTED, BODY, _listed(2, 1, 3), MalformedChunk),
        (LISTED, BODY, _listed(0, 1, 7), MalformedChunk),  # the tail's first place
        (LISTED, BODY, _listed(0, 1, 2**32 - 1), MalformedChunk),
        (LISTED, BODY + 12, struct.pack("<f", np.nan), NotFinite),
        (LISTED, BODY + 20, struct.pack("<f", -np.inf), NotFinite),
        (LISTED, TAIL_OF_LISTED + 4, struct.pack("<f", np.inf), NotFinite),
        (QUANTISED, BODY + 8, struct.pack("<f", np.nan), NotFinite),
        (QUANTISED, BODY, struct.pack("<f", np.inf), NotFinite),
        (QUANTISED, BODY + 4, struct.pack("<f", -1e-30), MalformedChunk),
        (QUANTISED, LEVELS + 1027, struct.pack("<b", -128), MalformedChunk),
        (QUANTISED, LEVELS + 1028, struct.pack("<f", np.nan), NotFinite),
        (QUANTISED, 20, bytes(16), WrongContext),
        (LISTED, 20, bytes(16), WrongContext),
    ],
)
def test_hostile_bytes_change_nothing(of, offset, bad, error):
    total = plain.accumulator(of)
    update = thin(np.random.default_rng(0), of.parameter_count, 2)
    update[-2:] = 0
    total.add(0, io.BytesIO(upload(of, update)))
    before = b"".join(total.result())
    row = bytearray(upload(of, update, member=1))
    row[offset : offset + len(bad)] = bad
    with pytest.raises(error):
        total.add(1, io.BytesIO(bytes(row)))
    assert b"".join(total.result()) == before


@pytest.mark.parametrize("of", [LISTED, QUANTISED])
@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(of, change):
    row = upload(of, np.zeros(of.parameter_count, np.float32))
    with pytest.raises(MalformedChunk):
        plain.accumulator(of).add(0, io.BytesIO((row + b"\0")[: len(row) + change]))


def test_places_ascend_from_block_to_block():
    of = context(80_000, listed=40_000)
    row = bytearray(upload(of, (np.arange(80_000) < 40_000).astype(np.float32)))
    struct.pack_into("<I", row, BODY + 4 * 32768, 32767)  # the place before, once more
    with pytest.raises(MalformedChunk):
        plain.accumulator(of).add(0, io.BytesIO(bytes(row)))


def test_a_file_that_changes_between_the_passes_spoils_the_total():
    """The second pass checks places again: they index memory."""

    class Changing(io.BytesIO):
        reads = 0

        def readinto(self, buffer):
            count = super().readinto(buffer)
            if len(buffer) == 12:
                self.reads += 1
                if self.reads == 3:  # places, values, and places again
                    buffer[:12] = _listed(0, 1, 2**31)
            return count

    total = plain.accumulator(LISTED)
    with pytest.raises(SpoiledTotal):
        total.add(0, Changing(upload(LISTED, np.zeros(9, np.float32))))


def test_forms_do_not_read_each_other():
    update = np.zeros(16, np.float32)
    whole = upload(context(16), update)
    assert len(whole) == len(upload(context(16, listed=8), update))
    with pytest.raises(WrongContext):
        plain.accumulator(context(16, listed=8)).add(0, io.BytesIO(whole))


def test_more_values_than_are_listed_are_refused_at_the_call():
    encoder = plain.encoder(LISTED, 0, None, np.random.default_rng(0))
    with pytest.raises(InvalidUpdate):
        encoder.encode(np.ones(9, np.float32), 1)


@pytest.mark.parametrize(
    "form", [{"listed": 10}, {"listed": -1}, {"listed": 8, "tail_length": 2}, {"listed": 1}]
)
def test_contexts_that_cannot_be(form):
    with pytest.raises(InvalidContext):
        context(9, **form, quantised=form == {"listed": 1})


@pytest.mark.parametrize("form", [{"listed": 1}, {"quantised": True}])
def test_other_protections_have_one_form(form):
    with pytest.raises(InvalidContext):
        BfvParameters.derive(context(9, **form))


def test_adding_takes_the_totals_memory_and_no_more():
    count = 1_000_000
    of = context(count, listed=count // 2)
    row = io.BytesIO(upload(of, (np.arange(count) % 2).astype(np.float32)))
    total = plain.accumulator(of)
    tracemalloc.start()
    total.add(0, row)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20
