"""The sum of an attempt: only the update that is wanted goes in, whole or not at all."""

import asyncio
import hashlib
import io
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import crypto
from coordinator.aggregation import Aggregation, Rule
from coordinator.round_sum import RoundSum, Upload, refused_by_crypto
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.terms import Protection

MEMBERS = ("a", "b", "c")
PARAMETERS = 500
CONTEXT = crypto.UpdateContext(
    run_id=bytes(range(16)),
    round=3,
    attempt=2,
    parameter_count=PARAMETERS,
    capacity=4,
    weight_cap=128,
    clip=1.0,
)
KEY = crypto.RunKey(bytes(range(32)))
NAMES: dict[Protection, crypto.ProtectionName] = {
    Protection.PLAIN: "plain",
    Protection.ENCRYPTED: "encrypted",
}


class Desk:
    """A sum, and agents that encode for it."""

    def __init__(self, protection: Protection, spool: Path) -> None:
        self.protection = protection
        self.spool = spool
        self.sum = RoundSum(CONTEXT, protection, MEMBERS, spool)
        self.key = None if protection is Protection.PLAIN else KEY

    def encode(self, slot: int, value: float = 0.5, weight: int = 10) -> bytes:
        rng = np.random.default_rng(slot)
        module = crypto.protection(NAMES[self.protection])
        encoder = module.encoder(CONTEXT, slot, self.key, rng)
        return b"".join(encoder.encode(np.full(PARAMETERS, value, np.float32), weight))

    def upload(self, data: bytes, agent: str = "a") -> Upload:
        artifact = ArtifactReference(hashlib.sha256(data).digest(), len(data))
        return Upload(agent, CONTEXT.run_id, CONTEXT.round, CONTEXT.attempt, artifact)

    async def send(self, data: bytes, agent: str = "a") -> Path | None:
        """Spool and add an update as the service does; return where it was spooled."""
        upload = self.upload(data, agent)
        path = self.sum.path_for(upload)
        if path is not None:
            path.write_bytes(data)
            try:
                await self.sum.add(upload, path)
            finally:
                path.unlink()
        return path

    def opened(self) -> crypto.OpenedSum:
        encoded = b"".join(self.sum.encoded())
        module = crypto.protection(NAMES[self.protection])
        return module.open_sum(CONTEXT, self.key, self.sum.slots, io.BytesIO(encoded))


@pytest.fixture(params=NAMES, ids=lambda protection: protection.name.lower())
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(request.param, tmp_path / "spool")


@pytest.fixture
def plain(tmp_path: Path) -> Desk:
    return Desk(Protection.PLAIN, tmp_path / "spool")


def refusal(call: Callable[[], object]) -> Reason:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.reason


async def refused(desk: Desk, data: bytes, agent: str = "a") -> Reason:
    with pytest.raises(Refused) as caught:
        await desk.send(data, agent)
    return caught.value.reason


async def test_updates_of_members_become_their_weighted_mean(desk: Desk) -> None:
    await desk.send(desk.encode(2, 0.8, weight=30), "c")
    await desk.send(desk.encode(0, -0.4, weight=10), "a")
    assert desk.sum.slots == (0, 2)
    opened = desk.opened()
    assert (opened.total_weight, opened.count) == (40, 2)
    np.testing.assert_allclose(opened.mean, 0.5, atol=1e-3)
    assert list(desk.spool.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"run_id": bytes(16)}, {"round": 2}, {"round": 4}, {"attempt": 1}, {"attempt": 3}],
    ids=str,
)
def test_an_update_for_something_else_is_refused(plain: Desk, change: dict[str, object]) -> None:
    upload = replace(plain.upload(plain.encode(0)), **change)  # type: ignore[arg-type]
    assert refusal(lambda: plain.sum.path_for(upload)) is Reason.WRONG_ROUND


def test_an_update_of_no_member_is_refused(plain: Desk) -> None:
    upload = plain.upload(plain.encode(0), "stranger")
    assert refusal(lambda: plain.sum.path_for(upload)) is Reason.NOT_IN_COHORT


def test_an_update_of_another_size_is_refused_before_it_travels(desk: Desk) -> None:
    data = desk.encode(0)
    for wrong, reason in ((data + b"x", Reason.TOO_LARGE), (data[:-1], Reason.MALFORMED)):
        assert refusal(lambda wrong=wrong: desk.sum.path_for(desk.upload(wrong))) is reason  # type: ignore[misc]
    huge = replace(desk.upload(data), artifact=ArtifactReference(bytes(32), 2**63))
    assert refusal(lambda: desk.sum.path_for(huge)) is Reason.TOO_LARGE


async def test_the_same_update_again_is_counted_once(desk: Desk) -> None:
    data = desk.encode(0)
    assert await desk.send(data) is not None
    assert await desk.send(data) is None
    assert desk.opened().count == 1


async def test_another_update_of_a_counted_agent_is_refused(desk: Desk) -> None:
    await desk.send(desk.encode(0, 0.5))
    assert await refused(desk, desk.encode(0, 0.6)) is Reason.WRONG_ROUND
    np.testing.assert_allclose(desk.opened().mean, 0.5, atol=1e-3)


async def test_an_update_in_anothers_name_is_refused(desk: Desk) -> None:
    assert await refused(desk, desk.encode(1), agent="a") is Reason.WRONG_ROUND
    assert desk.sum.slots == ()
    await desk.send(desk.encode(0), agent="a")


async def test_garbage_is_refused_and_adds_nothing(desk: Desk) -> None:
    good = desk.encode(0)
    await desk.send(desk.encode(1, 0.25), "b")
    for bad in (bytes(len(good)), b"\xff" * len(good), good[:60] + b"\xff" * (len(good) - 60)):
        assert await refused(desk, bad) in (
            Reason.MALFORMED,
            Reason.WRONG_ROUND,
            Reason.NOT_FINITE,
        )
        assert desk.sum.slots == (1,)
        assert desk.sum.adding is None
    np.testing.assert_allclose(desk.opened().mean, 0.25, atol=1e-3)
    assert list(desk.spool.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_an_update_that_is_not_finite_is_refused(plain: Desk, value: float) -> None:
    data = bytearray(plain.encode(0))
    data[-4:] = np.float32(value).tobytes()  # the last value: nothing before it may be in
    assert await refused(plain, bytes(data)) is Reason.NOT_FINITE
    assert plain.sum.slots == ()
    await plain.send(plain.encode(0, 0.5))  # the agent may send a good one
    np.testing.assert_array_equal(plain.opened().mean, np.full(PARAMETERS, 0.5, np.float32))


async def test_a_weight_out_of_range_is_refused(plain: Desk) -> None:
    data = bytearray(plain.encode(0))
    place = len(data) - 4 * PARAMETERS - 8
    data[place : place + 8] = (129).to_bytes(8, "little")
    assert await refused(plain, bytes(data)) is Reason.WEIGHT_OUT_OF_RANGE


async def test_it_says_whose_update_is_on_its_way(plain: Desk) -> None:
    upload = plain.upload(data := plain.encode(0))
    path = plain.sum.path_for(upload)
    assert path is not None
    path.write_bytes(data)
    adding = asyncio.create_task(plain.sum.add(upload, path))
    await asyncio.sleep(0)
    assert plain.sum.adding == "a"
    await adding
    assert plain.sum.adding is None


def test_every_agent_and_update_has_its_own_place(plain: Desk) -> None:
    uploads = [
        plain.upload(plain.encode(slot, value), agent)
        for slot, agent in enumerate(MEMBERS)
        for value in (0.1, 0.2)
    ]
    paths = {plain.sum.path_for(upload) for upload in uploads}
    assert len(paths) == len(uploads)
    assert {path.parent for path in paths if path} == {plain.spool}
    assert paths == {plain.sum.path_for(upload) for upload in uploads}  # an upload is resumed


async def test_what_was_accepted_is_added_again_after_a_restart(desk: Desk) -> None:
    uploads = {agent: desk.encode(slot) for slot, agent in enumerate(MEMBERS[:2])}
    for agent, data in uploads.items():
        upload = desk.upload(data, agent)
        path = desk.sum.path_for(upload)
        assert path is not None
        path.write_bytes(data)
        await desk.sum.add(upload, path)
    undisturbed = b"".join(desk.sum.encoded())
    again = Desk(desk.protection, desk.spool)
    for agent, data in uploads.items():
        await again.sum.restore(agent, desk.upload(data, agent).artifact.sha256)
    assert b"".join(again.sum.encoded()) == undisturbed
    assert again.sum.path_for(desk.upload(uploads["a"], "a")) is None
    with pytest.raises(FileNotFoundError):
        await again.sum.restore("c", bytes(32))
    again.sum.discard()
    assert not desk.spool.exists()
    again.sum.discard()


def test_a_fault_of_ours_is_no_refusal() -> None:
    fault = crypto.SpoiledTotal("total", "whole", "half")
    with pytest.raises(crypto.SpoiledTotal):
        refused_by_crypto(fault)
    peer = crypto.DuplicateMember("member", "one", "two")
    assert refused_by_crypto(peer).reason is Reason.MALFORMED


async def test_updates_are_added_in_as_many_processes_as_asked_for(tmp_path: Path) -> None:
    context = replace(CONTEXT, parameter_count=300_000)  # two chunks
    encrypted, values = crypto.protection("encrypted"), np.full(300_000, 0.5, np.float32)
    encoder = encrypted.encoder(context, 1, KEY, np.random.default_rng(0))
    data = b"".join(encoder.encode(values, 10))
    spooled = tmp_path / "update"
    spooled.write_bytes(data)
    artifact = ArtifactReference(hashlib.sha256(data).digest(), len(data))
    upload = Upload("b", context.run_id, context.round, context.attempt, artifact)
    before = set(multiprocessing.active_children())
    round_sum = RoundSum(context, Protection.ENCRYPTED, MEMBERS, tmp_path / "spool", 2)
    await round_sum.add(upload, spooled)
    assert len(set(multiprocessing.active_children()) - before) == 2
    summed = io.BytesIO(b"".join(round_sum.encoded()))
    opened = encrypted.open_sum(context, KEY, round_sum.slots, summed)
    np.testing.assert_allclose(opened.mean, values, rtol=1e-4)


def robust_sum(spool: Path) -> RoundSum:
    """Open a sum by medians over what is spooled there."""
    return RoundSum(CONTEXT, Protection.PLAIN, MEMBERS, spool, aggregation=Aggregation(Rule.MEDIAN))


async def test_a_robust_sum_is_the_same_after_a_restart(plain: Desk, tmp_path: Path) -> None:
    """What it reads at the end is in the spool; a process that dies before finds it there."""
    spool, accepted = tmp_path / "spool", {}
    first = robust_sum(spool)
    for slot, value in ((2, 1e9), (0, 0.25), (1, 0.5)):
        data = plain.encode(slot, value, weight=100 if slot == 2 else 1)
        upload = plain.upload(data, MEMBERS[slot])
        path = first.path_for(upload)
        assert path is not None
        path.write_bytes(data)
        await first.add(upload, path)
        assert first.path_for(upload) is None
        accepted[MEMBERS[slot]] = upload.artifact.sha256
    encoded = b"".join(first.encoded())
    again = robust_sum(spool)
    for agent, sha256 in accepted.items():
        await again.restore(agent, sha256)
    assert b"".join(again.encoded()) == encoded
    again.rebuild()
    assert b"".join(again.encoded()) == encoded
    opened = crypto.protection("plain").open_sum(CONTEXT, None, again.slots, io.BytesIO(encoded))
    assert (opened.mean == 0.5).all()
    assert (opened.count, opened.total_weight) == (3, 102)


async def test_a_robust_sum_refuses_what_a_mean_refuses(plain: Desk, tmp_path: Path) -> None:
    total = robust_sum(tmp_path / "spool")
    data = plain.encode(0)
    for spoilt, reason in (
        (data[:-4] + b"\0\0\xc0\x7f", Reason.NOT_FINITE),
        (data[:52] + bytes(8) + data[60:], Reason.WEIGHT_OUT_OF_RANGE),
        (plain.encode(1), Reason.WRONG_ROUND),
    ):
        upload = plain.upload(spoilt)
        path = total.path_for(upload)
        assert path is not None
        path.write_bytes(spoilt)
        with pytest.raises(Refused) as caught:
            await total.add(upload, path)
        assert caught.value.reason is reason
    assert total.slots == ()
    with pytest.raises(crypto.EmptyTotal):
        total.encoded()
    assert refusal(lambda: total.path_for(plain.upload(data[:-1]))) is Reason.MALFORMED
