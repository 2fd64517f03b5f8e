"""Sums under masks: what opens, what does not, and which error says why."""

import io
import struct
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import (
    Correction,
    DuplicateMember,
    InvalidContext,
    Mask,
    MemberSwapped,
    MissingKey,
    OpeningFailed,
    TagMismatch,
    UpdateCountedTwice,
    UpdateLeftOut,
    WrongContext,
    masked,
    protection,
)
from crypto.exponents import BUCKETS, bucket, next_clip
from crypto.parameters import MODULUS, BfvParameters
from crypto.tags import PRIME, Tagger

from .conftest import RUN_KEY, Bench

HEADER, RING = 52, 4096


def as_member(encoded: bytes, member: int) -> bytes:
    """Rewrite the member's slot in both headers of an upload of two chunks of one ciphertext."""
    size = len(encoded) // 2
    for start in (0, size):
        slot = start + 6
        encoded = encoded[:slot] + struct.pack("<H", member) + encoded[slot + 2 :]
    return encoded


def as_context(encoded: bytes, context, parameters_id: bytes) -> bytes:
    """Rewrite round, attempt, parameters and run in both headers."""
    size = len(encoded) // 2
    fields = struct.pack("<IH", context.round, context.attempt)
    for start in (0, size):
        head = encoded[start : start + 8] + fields + encoded[start + 14 : start + 20]
        head += parameters_id + context.run_id
        encoded = encoded[:start] + head + encoded[start + HEADER :]
    return encoded


@pytest.fixture
def uploads(tagging, random_update):
    context = tagging.context()
    return [tagging.upload(context, i, random_update(seed=i), 5, i) for i in range(3)]


def summed(bench, placed, masks, context=None):
    """Sum uploads, each in some slot, and take out the masks of these members."""
    total = bench.protection.accumulator(context or bench.context())
    for slot, encoded in placed:
        total.add(slot, io.BytesIO(as_member(encoded, slot)))
    return b"".join(total.result(bench.correction(*masks)))


def test_the_accepted_updates_open(tagging, uploads):
    encoded = summed(tagging, enumerate(uploads), (0, 1, 2))
    opened = tagging.open(tagging.context(), (0, 1, 2), encoded)
    assert (opened.count, opened.total_weight) == (3, 15)
    assert tagging.open(tagging.context(), (2, 0, 1), encoded).count == 3


def test_an_update_left_out_is_named(tagging, uploads):
    """The coordinator says three, and gives the sum of two, plus a header that says three."""
    two = summed(tagging, enumerate(uploads[:2]), (0, 1))
    encoded = _with_count(two, 3)
    with pytest.raises(UpdateLeftOut, match="slot 2"):
        tagging.open(tagging.context(), (0, 1, 2), encoded)


def test_an_update_counted_twice_is_named(tagging, uploads):
    placed = [(0, uploads[0]), (1, uploads[1]), (2, uploads[1])]
    encoded = _with_count(summed(tagging, placed, (0, 1, 1)), 2)
    with pytest.raises(UpdateCountedTwice, match="slot 1"):
        tagging.open(tagging.context(), (0, 1), encoded)


def test_a_member_swapped_for_another_is_named(tagging, uploads):
    encoded = summed(tagging, [(0, uploads[0]), (2, uploads[2])], (0, 2))
    with pytest.raises(MemberSwapped, match=r"slot 1.*that of 2"):
        tagging.open(tagging.context(), (0, 1), encoded)


def test_another_number_of_updates_is_refused(tagging, uploads):
    encoded = summed(tagging, enumerate(uploads), (0, 1, 2))
    with pytest.raises(WrongContext) as refusal:
        tagging.open(tagging.context(), (0, 1), encoded)
    assert refusal.value.subject == "member or count"
    with pytest.raises(TagMismatch):
        tagging.open(tagging.context(), (0, 1), _with_count(encoded, 2))


def test_a_member_is_added_once_by_an_honest_coordinator(tagging, uploads):
    total = tagging.protection.accumulator(tagging.context())
    total.add(0, io.BytesIO(uploads[0]))
    with pytest.raises(DuplicateMember):
        total.add(0, io.BytesIO(uploads[0]))
    assert total.members == (0,)


@pytest.mark.parametrize(
    ("change", "subject"),
    [({"round": 6}, "round"), ({"attempt": 0}, "attempt"), ({"run_id": bytes(16)}, "run id")],
)
def test_a_replay_is_refused_with_its_own_headers_and_with_forged_ones(
    tagging, random_update, change, subject
):
    ours, theirs = tagging.context(), tagging.context(**change)
    uploads = [tagging.upload(theirs, i, random_update(seed=i), 5, i) for i in range(2)]
    replayed = summed(tagging, enumerate(uploads), (0, 1), theirs)
    with pytest.raises(WrongContext) as refusal:
        tagging.open(ours, (0, 1), replayed)
    assert refusal.value.subject == subject
    parameters_id = BfvParameters.derive(ours, tagging.name).id
    with pytest.raises(TagMismatch):
        tagging.open(ours, (0, 1), as_context(replayed, ours, parameters_id))


def test_a_sum_of_another_cohort_is_refused(masking, random_update):
    ours, theirs = masking.context(), masking.context(cohort=bytes(32))
    uploads = [masking.upload(theirs, i, random_update(seed=i), 5, i) for i in range(2)]
    replayed = summed(masking, enumerate(uploads), (0, 1), theirs)
    with pytest.raises(WrongContext) as refusal:
        masking.open(ours, (0, 1), replayed)
    assert refusal.value.subject == "parameters id"
    parameters_id = BfvParameters.derive(ours, masking.name).id
    with pytest.raises(TagMismatch):
        masking.open(ours, (0, 1), as_context(replayed, ours, parameters_id))


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 2 * RING - 1), delta=st.integers(1, (1 << 44) - 1))
def test_any_coefficient_shifted_by_a_known_amount_is_refused(place, delta):
    """BFV is malleable: the coordinator adds a plaintext of its choice. The tags notice it."""
    sealed, context, total = _small_total()
    right = Correction((Mask(bytes(32)),))
    words = right.words

    class Shifted(Correction):
        def words(self, chunk, count, plain_bits):
            shifted = words(chunk, count, plain_bits)
            if chunk == place // RING:
                index = np.uint64((1 << plain_bits) - 1)
                shifted[place % RING] = (shifted[place % RING] + np.uint64(delta)) & index
            return shifted

    encoded = b"".join(total.result(Shifted(right.masks)))
    with pytest.raises(OpeningFailed):
        sealed.open_sum(context, RUN_KEY, (0,), io.BytesIO(encoded))
    opened = sealed.open_sum(context, RUN_KEY, (0,), io.BytesIO(b"".join(total.result(right))))
    assert opened.count == 1


@pytest.mark.parametrize("left", [(), (0,), (0, 1, 2), (0, 0)])
def test_masks_left_in_or_taken_out_twice_are_noticed(masking, random_update, left):
    context = masking.context()
    uploads = [masking.upload(context, i, random_update(seed=i), 5, i) for i in range(2)]
    encoded = summed(masking, enumerate(uploads), left)
    with pytest.raises(TagMismatch):
        masking.open(context, (0, 1), encoded)


def test_a_single_masked_upload_is_noise_to_who_holds_the_run_key(masking, random_update):
    """What a member and the coordinator see together of one update: uniform coefficients."""
    context = masking.context(parameter_count=200_000)
    mask = Mask(bytes(32))
    encoder = masking.protection.encoder(
        context, 0, masking.run_key, np.random.default_rng(), [mask]
    )
    encoded = b"".join(encoder.encode(np.zeros(200_000, np.float32), 1))
    if masking.name == "sealed":
        return  # the same coefficients, and a cipher around them
    words = masked.words_of(
        memoryview(encoded)[HEADER : HEADER + 7 * RING * 25], slice(0, 25 * RING), 25 * RING
    )
    bits = BfvParameters.derive(context, "masked").plain_bits
    fractions = (words >> np.uint64(4)).astype(np.float64) / 2**bits
    assert abs(fractions.mean() - 0.5) < 0.01
    assert abs(fractions.std() - 12**-0.5) < 0.01


def test_pairs_cancel_and_leftovers_are_corrected(masking, random_update):
    """Three members, all pairs; member 2 vanishes: its pairs are taken out as the self masks."""
    context = masking.context()
    pair = {p: Mask(bytes([*p, *bytes(30)])) for p in ((0, 1), (0, 2), (1, 2))}
    minus = {p: Mask(m.key, -1) for p, m in pair.items()}
    own = [Mask(bytes([9, i, *bytes(30)])) for i in range(3)]
    masks = [
        [own[0], pair[0, 1], pair[0, 2]],
        [own[1], minus[0, 1], pair[1, 2]],
        [own[2], minus[0, 2], minus[1, 2]],
    ]
    updates = [random_update(seed=i) for i in range(3)]
    total = masking.protection.accumulator(context)
    sums = []
    for i in range(3):
        rng = np.random.default_rng(i)
        encoder = masking.protection.encoder(context, i, masking.run_key, rng, masks[i])
        total.add(i, io.BytesIO(b"".join(encoder.encode(updates[i], 5))))
        leftovers = [*own[: i + 1], *(pair[p] for p in pair if p[0] <= i < p[1])]
        sums.append(b"".join(total.result(Correction(tuple(leftovers)))))
    for i, encoded in enumerate(sums):
        opened = masking.open(context, tuple(range(i + 1)), encoded)
        expected = np.mean([np.clip(u, -0.5, 0.5) for u in updates[: i + 1]], axis=0)
        np.testing.assert_allclose(opened.mean, expected, atol=1e-5)


def test_every_protection_opens_the_same_bits(random_update):
    updates = [random_update(seed=i) for i in range(3)]
    opened = {}
    for name in ("masked", "encrypted", "sealed"):
        bench = Bench(name)
        opened[name] = bench.through(bench.context(), updates, [1, 2, 3])
    for name in ("masked", "sealed"):
        same = opened[name].mean.view(np.uint32) == opened["encrypted"].mean.view(np.uint32)
        assert same.all()
        assert opened[name].exponents == opened["encrypted"].exponents


def test_the_coordinator_reads_a_masked_sum_without_the_run_key(random_update):
    bench = Bench("masked")
    context = bench.context()
    upload = bench.upload(context, 0, random_update(), 5)
    encoded = bench.summed(bench.total(context, upload))
    ours = masked.read_sum(context, (0,), io.BytesIO(encoded))
    np.testing.assert_array_equal(ours.mean, bench.open(context, (0,), encoded).mean)


def test_masks_go_with_the_protection(bench, random_update):
    context = bench.context()
    rng = np.random.default_rng()
    wrong = None if bench.masked else [Mask(bytes(32))]
    with pytest.raises(MissingKey):
        bench.protection.encoder(context, 0, bench.run_key, rng, wrong)
    total = bench.total(context, bench.upload(context, 0, random_update(), 5))
    with pytest.raises(InvalidContext):
        total.result(None if bench.masked else Correction(()))
    assert "31" not in repr(Correction((Mask(b"1" * 32),)))


def test_tags_need_room_for_their_sum(tagging):
    for capacity, fits in ((2219, True), (2220, False)):
        context = tagging.context(capacity=capacity, weight_cap=1, parameter_count=5)
        if fits:
            tagging.encoder(context, 0, np.random.default_rng())
        else:
            with pytest.raises(InvalidContext):
                tagging.encoder(context, 0, np.random.default_rng())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, (1 << 52) - 1), min_size=1, max_size=300), st.integers(0, 2**32 - 1))
def test_tags_are_inner_products_in_the_field(coefficients, seed):
    """Against Python's integers."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    bench = Bench("encrypted")
    tagger = Tagger(BfvParameters.derive(replace(bench.context(), round=seed)), RUN_KEY)
    words = np.array(coefficients, np.uint64)
    for k, found in enumerate(tagger._sums(0, words)):
        key = tagger._derive(b"vector", 0, k)
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        drawn = stream.update(bytes(4 * len(words)))
        factors = [w & PRIME for w in struct.unpack(f"<{len(words)}I", drawn)]
        assert found == sum(f * m for f, m in zip(factors, coefficients, strict=True)) % PRIME


@given(
    st.integers(1, 2219),
    st.integers(1, 2**31),
    st.sampled_from([8, 16]),
    st.integers(1, 2**32 - 1),
)
def test_the_sum_of_packed_coefficients_tags_and_counters_never_reaches_t(k, p, bits, cap):
    """The proof of `parameters`, with masks: the sum modulo t is the sum, noise included."""
    context = Bench("sealed").context(
        capacity=k, parameter_count=p, update_bits=bits, weight_cap=cap
    )
    try:
        numbers = BfvParameters.derive(context, "sealed")
    except InvalidContext:
        return
    t = 1 << numbers.plain_bits
    per_field = k * 2 * numbers.half_levels
    fields = range(numbers.values_per_coefficient)
    assert sum(per_field << (numbers.field_bits * f) for f in fields) < t
    assert k * max(cap, p) < t
    assert k * (PRIME - 1) < t
    noise = k * (21 + Fraction(1, 2) + 8) + Fraction(1, 2) + 8  # one correction, one more drop
    assert noise < Fraction(MODULUS, 2 * t)


@given(st.floats(1e-12, 1e12), st.floats(2**-20, 2**10))
def test_the_bucket_of_an_update_bounds_it_from_above(clip, ratio):
    clip = float(np.float32(clip))
    largest = np.float32(clip * ratio)
    place = bucket(np.array([0, largest, -largest / 2], np.float32), float(clip))
    exponent = place - 10
    assert largest <= clip * 2.0**exponent or exponent == 2
    assert largest > clip * 2.0 ** (exponent - 1) or exponent == -10
    histogram = [0] * BUCKETS
    histogram[place] = 3
    assert next_clip(clip, histogram) == float(np.float32(clip)) * 2.0**exponent


def test_the_histogram_is_opened_and_the_next_clip_follows(tagging):
    context = tagging.context(clip=1.0)
    updates = [np.full(5000, value, np.float32) for value in (0.0, 0.3, 0.25, 7.0)]
    opened = tagging.through(context, updates, [1, 1, 1, 1])
    assert opened.exponents == (1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1)
    assert next_clip(1.0, opened.exponents) == 4.0


def _with_count(encoded: bytes, count: int) -> bytes:
    return as_member(encoded, count)


def _small_total():
    sealed = protection("sealed")
    context = Bench("sealed").context()
    encoder = sealed.encoder(context, 0, RUN_KEY, np.random.default_rng(0), [Mask(bytes(32))])
    total = sealed.accumulator(context)
    total.add(0, io.BytesIO(b"".join(encoder.encode(np.zeros(5000, np.float32), 1))))
    return sealed, context, total
