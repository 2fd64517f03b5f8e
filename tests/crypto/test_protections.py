"""The laws that every protection obeys, whatever it hides."""

import io
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from crypto import (
    CapacityExceeded,
    DuplicateMember,
    EmptyTotal,
    InvalidContext,
    InvalidUpdate,
    MalformedChunk,
    MissingKey,
    NotFinite,
    RunKey,
    SpoiledTotal,
    WeightOutOfRange,
    WrongContext,
    protection,
)

MEMBER_OFFSET, ATTEMPT_OFFSET, PARAMETERS_OFFSET, RUN_OFFSET = 6, 12, 20, 36


def test_the_mean_is_weighted(bench, random_update):
    context = bench.context()
    updates = [random_update(seed=i) for i in range(3)]
    opened = bench.through(context, updates, [100, 1, 50])
    weights = np.array([100, 1, 50], np.float64)
    expected = np.clip(updates, -0.5, 0.5).astype(np.float64).T @ weights / 151
    assert (opened.total_weight, opened.count) == (151, 3)
    assert opened.mean.dtype == np.float32
    assert opened.mean.shape == (5000,)
    if bench.name == "plain":
        expected = np.array(updates, np.float64).T @ weights / 151
        np.testing.assert_array_equal(opened.mean, expected.astype(np.float32))
    np.testing.assert_allclose(opened.mean, expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4096, 4097, 8192, 8193, 12288, 12289, 263_000])
@pytest.mark.parametrize("bits", [8, 16])
def test_any_length_comes_through(bench, random_update, count, bits):
    context = bench.context(parameter_count=count, update_bits=bits, capacity=2, weight_cap=1)
    update = random_update(count)
    opened = bench.through(context, [update], [1])
    step = 0.5 / (127 if bits == 8 else 32767)
    np.testing.assert_allclose(opened.mean, np.clip(update, -0.5, 0.5), atol=step)


def test_an_open_file_serves_as_well_as_memory(bench, random_update, tmp_path):
    context = bench.context()
    upload = bench.upload(context, 0, random_update(), 5)
    (tmp_path / "upload").write_bytes(upload)
    total = bench.protection.accumulator(context)
    assert total.encoded_update_size == len(upload)
    with (tmp_path / "upload").open("rb") as file:
        file.seek(17)  # where the file stands does not matter
        total.add(0, file)
    (tmp_path / "sum").write_bytes(bench.summed(total))
    with (tmp_path / "sum").open("rb") as file:
        opened = bench.protection.open_sum(context, bench.run_key, [0], file)
    assert opened.count == 1


def test_the_result_can_be_read_twice_and_between_additions(bench, random_update):
    context = bench.context()
    total = bench.total(context, bench.upload(context, 0, random_update(), 5))
    first = bench.summed(total)
    assert bench.summed(total) == first
    total.add(9, io.BytesIO(bench.upload(context, 9, random_update(seed=9), 5)))
    assert total.members == (0, 9)
    assert bench.open(context, (0, 9), bench.summed(total)).count == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2500, 4999])
def test_a_value_that_is_not_finite_is_refused_before_the_first_byte(
    bench, random_update, bad, place
):
    context = bench.context()
    update = random_update()
    update[place] = bad
    encoder = bench.encoder(context, 0, np.random.default_rng())
    with pytest.raises(NotFinite, match=f"value {place} "):
        encoder.encode(update, 1)


@pytest.mark.parametrize(
    "update",
    [
        np.zeros(4999, np.float32),
        np.zeros(5001, np.float32),
        np.zeros(5000, np.float64),
        np.zeros((5000, 1), np.float32),
    ],
)
def test_an_update_of_another_shape_or_type_is_refused(bench, update):
    encoder = bench.encoder(bench.context(), 0, np.random.default_rng())
    with pytest.raises(InvalidUpdate):
        encoder.encode(update, 1)


@pytest.mark.parametrize("weight", [0, -1, 101])
def test_a_weight_out_of_range_is_refused_by_the_encoder(bench, random_update, weight):
    encoder = bench.encoder(bench.context(), 0, np.random.default_rng())
    with pytest.raises(WeightOutOfRange):
        encoder.encode(random_update(), weight)


@pytest.mark.parametrize("weight", [1, 100])
def test_the_weights_at_the_ends_of_the_range_are_accepted(bench, random_update, weight):
    opened = bench.through(bench.context(), [random_update()], [weight])
    assert opened.total_weight == weight


def _replaced(encoded: bytes, offset: int, new: bytes) -> bytes:
    return encoded[:offset] + new + encoded[offset + len(new) :]


REFUSED_UPLOADS = {
    "empty": (lambda u: b"", MalformedChunk),
    "truncated by one": (lambda u: u[:-1], MalformedChunk),
    "header only": (lambda u: u[:52], MalformedChunk),
    "longer by one": (lambda u: u + b"\0", MalformedChunk),
    "doubled": (lambda u: u + u, MalformedChunk),
    "garbage": (lambda u: bytes(np.random.default_rng(0).bytes(len(u))), MalformedChunk),
    "zeros": (lambda u: bytes(len(u)), MalformedChunk),
    "another version": (lambda u: _replaced(u, 4, b"\2"), MalformedChunk),
    "a sum": (lambda u: _replaced(u, 5, bytes([u[5] + 1])), WrongContext),
    "another member": (lambda u: _replaced(u, MEMBER_OFFSET, b"\7\0"), WrongContext),
    "another ciphertext count": (lambda u: _replaced(u, 14, b"\7\0"), MalformedChunk),
    "another chunk": (lambda u: _replaced(u, 16, b"\7\0\0\0"), MalformedChunk),
}


@pytest.mark.parametrize("name", REFUSED_UPLOADS)
def test_a_bad_upload_is_refused_and_changes_nothing(bench, random_update, name):
    context = bench.context()
    total = bench.total(context, bench.upload(context, 0, random_update(), 5))
    before = bench.summed(total)
    spoil, refusal = REFUSED_UPLOADS[name]
    good = bench.upload(context, 1, random_update(seed=1), 5)
    with pytest.raises(refusal):
        total.add(1, io.BytesIO(spoil(good)))
    assert total.members == (0,)
    assert bench.summed(total) == before
    total.add(1, io.BytesIO(good))  # and the member may try again


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"run_id": bytes(16)}, "run id"),
        ({"round": 8}, "round"),
        ({"attempt": 2}, "attempt"),
        ({"weight_cap": 101}, "parameters id"),
        ({"capacity": 3}, "parameters id"),
    ],
)
def test_an_upload_or_a_sum_of_another_context_is_refused(bench, random_update, change, subject):
    ours, theirs = bench.context(), bench.context(**change)
    upload = bench.upload(theirs, 0, random_update(), 5)
    total = bench.protection.accumulator(ours)
    with pytest.raises(WrongContext) as refusal:
        total.add(0, io.BytesIO(upload))
    assert refusal.value.subject == subject
    assert total.members == ()
    encoded = bench.summed(bench.total(theirs, upload))
    with pytest.raises(WrongContext) as refusal:
        bench.open(ours, (0,), encoded)
    assert refusal.value.subject == subject


def test_an_update_of_another_length_is_refused(bench, random_update):
    longer = bench.context(parameter_count=20_000)
    upload = bench.upload(longer, 0, random_update(20_000), 5)
    with pytest.raises(MalformedChunk, match="encoded size"):
        bench.protection.accumulator(bench.context()).add(0, io.BytesIO(upload))


def test_a_member_is_added_once(bench, random_update):
    context = bench.context()
    upload = bench.upload(context, 0, random_update(), 5)
    total = bench.total(context, upload)
    before = bench.summed(total)
    with pytest.raises(DuplicateMember):
        total.add(0, io.BytesIO(upload))
    assert bench.summed(total) == before


def test_capacity_is_the_end(bench, random_update):
    context = bench.context(capacity=2)
    uploads = [bench.upload(context, i, random_update(seed=i), 5) for i in range(3)]
    total = bench.total(context, *uploads[:2])
    before = bench.summed(total)
    with pytest.raises(CapacityExceeded):
        total.add(2, io.BytesIO(uploads[2]))
    assert total.members == (0, 1)
    assert bench.summed(total) == before


def test_a_member_must_fit_the_header(bench):
    for member in (-1, 1 << 16):
        with pytest.raises(InvalidContext):
            bench.encoder(bench.context(), member, np.random.default_rng())
        with pytest.raises(InvalidContext):
            bench.protection.accumulator(bench.context()).add(member, io.BytesIO())


def test_nothing_sums_to_nothing(bench):
    with pytest.raises(EmptyTotal):
        bench.protection.accumulator(bench.context()).result()


@pytest.mark.parametrize(
    ("members", "refusal"),
    [
        ((), CapacityExceeded),
        ((0, 1, 2, 3, 4), CapacityExceeded),
        ((0, 0), WrongContext),
        ((0,), WrongContext),
        ((0, 1, 2), WrongContext),
    ],
)
def test_a_sum_opens_for_the_number_of_its_members_only(bench, random_update, members, refusal):
    context = bench.context()
    uploads = [bench.upload(context, i, random_update(seed=i), 5) for i in range(2)]
    encoded = bench.summed(bench.total(context, *uploads))
    with pytest.raises(refusal):
        bench.open(context, members, encoded)


@pytest.mark.parametrize("name", [n for n in REFUSED_UPLOADS if n != "a sum"])
def test_a_bad_sum_is_refused(bench, random_update, name):
    context = bench.context()
    encoded = bench.summed(bench.total(context, bench.upload(context, 0, random_update(), 5)))
    spoil, refusal = REFUSED_UPLOADS[name]
    with pytest.raises(refusal):
        bench.open(context, (0,), spoil(encoded))


class _Shrinking(io.BytesIO):
    """A file whose end vanishes after it has been validated."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__(encoded)
        self.rewinds = 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if (offset, whence) in ((0, 0), (60, 0)):
            self.rewinds += 1
            if self.rewinds > 2:
                self.truncate(len(self.getvalue()) - 10)
        return super().seek(offset, whence)


def test_an_upload_that_changes_while_it_is_added_spoils_the_total(bench, random_update):
    context = bench.context()
    total = bench.total(context, bench.upload(context, 0, random_update(), 5))
    changing = _Shrinking(bench.upload(context, 1, random_update(), 5))
    changing.rewinds = {"masked": -1}.get(bench.name, 0)
    with pytest.raises(SpoiledTotal):
        total.add(1, changing)
    with pytest.raises(SpoiledTotal):
        total.result()
    with pytest.raises(SpoiledTotal):
        total.add(2, io.BytesIO(bench.upload(context, 2, random_update(), 5)))


def test_the_encoder_needs_no_memory_that_grows_with_the_update(bench):
    peaks = []
    for count in (600_000, 2_400_000):
        context = bench.context(parameter_count=count)
        encoder = bench.encoder(context, 0, np.random.default_rng())
        update = np.zeros(count, np.float32)
        tracemalloc.start()
        size = sum(len(chunk) for chunk in encoder.encode(update, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size == encoder.encoded_size
    assert peaks[1] <= peaks[0] + 64 * 1024
    assert peaks[1] < 8 << 20


def test_a_key_goes_with_the_protection(bench, random_update):
    context = bench.context()
    wrong = RunKey(bytes(32)) if bench.run_key is None else None
    rng, masks = np.random.default_rng(), bench.masks(0)
    with pytest.raises(MissingKey):
        bench.protection.encoder(context, 0, wrong, rng, masks)
    encoded = bench.summed(bench.total(context, bench.upload(context, 0, random_update(), 5)))
    with pytest.raises(MissingKey):
        bench.protection.open_sum(context, wrong, [0], io.BytesIO(encoded))


def test_an_unknown_protection_is_refused():
    with pytest.raises(InvalidContext):
        protection("sealed?")


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": bytes(15)},
        {"round": -1},
        {"round": 1 << 32},
        {"attempt": 1 << 16},
        {"parameter_count": 0},
        {"parameter_count": (1 << 31) + 1},
        {"capacity": 0},
        {"capacity": 1 << 16},
        {"weight_cap": 0},
        {"weight_cap": 1 << 32},
        {"update_bits": 12},
    ],
)
def test_a_context_out_of_range_is_refused(bench, change):
    with pytest.raises(InvalidContext):
        replace(bench.context(), **change)


def test_the_header_is_what_the_readme_says(bench, random_update):
    context = bench.context()
    upload = bench.upload(context, 258, random_update(), 5)
    kinds = {"plain": (1, 0), "encrypted": (3, 1), "masked": (5, 1), "sealed": (7, 1)}
    kind, count = kinds[bench.name]
    expected = struct.pack("<4sBBHIHHI", b"FDLM", 1, kind, 258, 7, 1, count, 0)
    assert upload[:PARAMETERS_OFFSET] == expected
    assert upload[RUN_OFFSET:52] == context.run_id


def test_a_tail_that_fills_the_clip_tells_nothing_of_the_parameters_range(tagging, random_update):
    update = random_update() * np.float32(1e-4)
    short, long = (tagging.context(parameter_count=len(update) + more) for more in (0, 4))
    alone = tagging.through(short, [update], [5])
    tail = np.full(4, short.clip, np.float32)
    context = replace(long, tail_length=4)
    found = tagging.through(context, [np.concatenate([update, tail])], [5])
    assert found.exponents == alone.exponents
    assert found.saturated == 0
    np.testing.assert_allclose(found.mean[-4:], tail, rtol=1e-4)


@pytest.mark.parametrize("length", [-1, 5000])
def test_an_update_is_not_all_tail(plain, length):
    with pytest.raises(InvalidContext, match="tail_length"):
        plain.context(tail_length=length)
