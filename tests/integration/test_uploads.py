"""Bad uploads inside a live round: each is refused with its reason, and the round goes on."""

import hashlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from coordinator.run_state import Phase
from fedloom.artifacts import PART_BYTES
from fedloom.errors import Reason
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc, control_pb2
from tests.integration.federation import Agent, Federation, until
from tests.integration.raw import (
    RawControl,
    Upload,
    encoded_update,
    end_of,
    pieces,
    raw_channel,
    refused,
    upload,
    upload_of,
)

WEIGHT = 32


@dataclass
class Live:
    """A collecting round of two honest agents, whose updates are in or held back, and a peer."""

    federation: Federation
    run_id: bytes
    honest: list[Agent]
    peer: Agent
    control: RawControl
    channel: grpc.aio.Channel
    cohort: control_pb2.Cohort

    @property
    def slot(self) -> int:
        """The peer's place in the cohort."""
        return list(self.cohort.members).index(self.peer.name)

    def update(self, value: float = 0.125, weight: int = WEIGHT, slot: int = -1) -> Upload:
        """Return an update of the peer's, or one that claims another slot."""
        slot = self.slot if slot < 0 else slot
        plan = self.federation.plan
        return upload_of(self.cohort, encoded_update(plan, self.cohort, slot, value, weight))

    def spooled(self) -> list[Path]:
        """Return the files in which the coordinator keeps what the peer has sent."""
        return list((self.federation.home / "spool" / self.run_id.hex()).rglob(f"{self.slot}.*.*"))

    async def completes(self) -> None:
        """The run completes for everybody."""
        for agent in self.honest:
            finished = await agent.finished()
            assert finished.outcome == control_pb2.RUN_OUTCOME_COMPLETED
        assert (await self.federation.run_over(self.run_id)).phase is Phase.COMPLETED


@pytest.fixture
async def live(federation: Federation) -> AsyncIterator[Live]:
    """Return a round that waits for the peer's upload."""
    honest = [await federation.enrol(name) for name in ("honest-0", "honest-1")]
    peer = await federation.enrol("peer")
    for agent in honest:
        agent.start()
    async with raw_channel(peer.identity) as channel:
        control = RawControl(channel)
        await control.hello(peer.identity)
        run_id = federation.start_run("plain", rounds=1, minimum=3)
        await control.receive("invitation")
        ready = control_pb2.Ready(run_id=run_id, round=1, weight_class=5)
        await control.send(ready=ready)
        cohort = (await control.receive("cohort")).cohort
        yield Live(federation, run_id, honest, peer, control, channel, cohort)


async def finish(live: Live, good: Upload) -> None:
    """Upload what is right, leave, and see the run complete with it."""
    await upload(live.channel, good.header, pieces(good.content, PART_BYTES))
    accepted = (await live.control.receive("accepted")).accepted
    sums = {update.slot: update.sha256 for update in accepted.updates}
    assert len(sums) == 3
    assert sums[live.slot] == good.header.sha256
    live.control.call.cancel()
    await live.completes()


async def test_headers_that_do_not_fit_the_round(live: Live) -> None:
    good = live.update()
    size = good.header.size_bytes
    for header, reason in (
        (good.but(run_id=bytes(16)), Reason.WRONG_ROUND),
        (good.but(run_id=b"short"), Reason.WRONG_ROUND),
        (good.but(round=2), Reason.WRONG_ROUND),
        (good.but(attempt=2), Reason.WRONG_ROUND),
        (good.but(size_bytes=size + 1), Reason.TOO_LARGE),
        (good.but(size_bytes=1 << 62), Reason.TOO_LARGE),
        (good.but(size_bytes=size - 1), Reason.MALFORMED),
        (good.but(size_bytes=0), Reason.MALFORMED),
        (good.but(sha256=b"short"), Reason.MALFORMED),
    ):
        async with refused(reason):
            await upload(live.channel, header, [good.content])
        assert live.spooled() == []
    await finish(live, good)


async def test_steps_out_of_order(live: Live) -> None:
    good = live.update()
    stub = artifact_pb2_grpc.ArtifactServiceStub(live.channel)
    request = artifact_pb2.UploadArtifactRequest
    for steps in (
        [],
        [request(part=b"x")],
        [request()],
        [request(header=good.header), request(header=good.header)],
        [request(header=good.header), request()],
        [request(header=good.header), request(part=b"")],
    ):
        call = stub.UploadArtifact(iter(steps))
        async with refused(Reason.MALFORMED):
            async for _ in call:
                pass
    await finish(live, good)


async def test_bytes_that_are_no_update(live: Live) -> None:
    good = live.update()
    size = good.header.size_bytes
    other_slot = (live.slot + 1) % 3
    for content, reason in (
        (bytes(size), Reason.MALFORMED),
        (good.content[:4] + bytes(size - 4), Reason.MALFORMED),
        (live.update(slot=other_slot).content, Reason.WRONG_ROUND),
        (live.update(value=math.nan).content, Reason.NOT_FINITE),
        (live.update(value=-math.inf).content, Reason.NOT_FINITE),
        (live.update(weight=0).content, Reason.WEIGHT_OUT_OF_RANGE),
        (live.update(weight=WEIGHT + 1).content, Reason.WEIGHT_OUT_OF_RANGE),
        (live.update(weight=1 << 63).content, Reason.WEIGHT_OUT_OF_RANGE),
    ):
        bad = upload_of(live.cohort, content)
        async with refused(reason):
            await upload(live.channel, bad.header, pieces(content, PART_BYTES))
        assert live.spooled() == []
    await finish(live, good)


async def test_parts_that_do_not_fit_their_header(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = live.update()
    async with refused(Reason.DIGEST_MISMATCH):
        await upload(live.channel, good.header, [bytes(len(good.content))])
    async with refused(Reason.MALFORMED, "expected a part of 1.."):
        await upload(live.channel, good.header, [good.content + b"x"])
    with monkeypatch.context() as small:
        small.setattr("fedloom.artifacts.PART_BYTES", 1000)
        async with refused(Reason.MALFORMED, "expected a part of 1..1000 "):
            await upload(live.channel, good.header, [good.content[:12_000], good.content[1000:]])
    assert live.spooled() == []
    await finish(live, good)


async def test_an_upload_that_is_cut_resumes_where_it_stopped(live: Live) -> None:
    good, part = live.update(), 4000
    parts = pieces(good.content, part)
    offset = await upload(
        live.channel, good.header, parts[:2], cut_when=lambda: held(live) == 2 * part
    )
    assert offset == 0
    async with refused(Reason.MALFORMED, "found none"):  # half-closed too early
        assert await upload(live.channel, good.header, parts[:3]) == 2 * part
    assert held(live) == 3 * part
    resumed = await upload(live.channel, good.header, parts)
    assert resumed == 3 * part  # every byte travelled once
    reports = live.federation.store.reports
    live.control.call.cancel()
    await live.completes()
    [sent] = [r["sent_bytes"] for r in reports(live.run_id) if r["agent_id"] == live.peer.name]
    assert sent == good.header.size_bytes


def held(live: Live) -> int:
    """Return the bytes of the peer's update that the coordinator has on disk."""
    return sum(path.stat().st_size for path in live.spooled())


async def test_many_uploads_that_are_begun_take_no_more_room_than_one(live: Live) -> None:
    for value in (1, 2, 3, 4):
        begun = live.update(value)
        first = pieces(begun.content, 4000)[:1]
        await upload(live.channel, begun.header, first, cut_when=lambda: held(live) == 4000)
        assert len(live.spooled()) == 1
    await finish(live, live.update())


async def test_a_repeated_upload_is_stored_and_a_second_one_is_not(live: Live) -> None:
    # One honest update is held back, so that the round is still collecting.
    good, other = live.update(), live.update(value=0.25)
    late = live.federation.agents[0]
    await late.stop()
    late.engine.may_finish.clear()
    await upload(live.channel, good.header, [good.content])
    assert await upload(live.channel, good.header, []) == good.header.size_bytes
    async with refused(Reason.WRONG_ROUND, "another update of this agent"):
        await upload(live.channel, other.header, [other.content])
    [kept] = live.spooled()  # until the sum is stored: a coordinator that is killed adds it again
    assert kept.read_bytes() == good.content
    late.engine.may_finish.set()
    late.start()
    await live.control.receive("accepted")
    live.control.call.cancel()
    await live.completes()


async def test_a_newer_stream_of_an_upload_takes_over_where_the_older_one_is(live: Live) -> None:
    good = live.update()
    stub = artifact_pb2_grpc.ArtifactServiceStub(live.channel)
    first = stub.UploadArtifact()  # its connection might be half-open: nobody says that it ended
    await first.write(artifact_pb2.UploadArtifactRequest(header=good.header))
    assert isinstance(await first.read(), artifact_pb2.UploadArtifactResponse)
    await first.write(artifact_pb2.UploadArtifactRequest(part=good.content[:12_000]))
    await until("the part to be stored", lambda: [f for f in live.spooled() if f.stat().st_size])
    assert await upload(live.channel, good.header, [good.content]) in range(8_000, 12_001)
    async with refused(Reason.INTERNAL, "took over"):  # agents try again later
        await first.read()
        raise await end_of(first)
    live.control.call.cancel()
    await live.completes()


async def test_outsiders_have_no_say_in_the_round(live: Live) -> None:
    outsider = await live.federation.enrol("outsider")
    good = live.update()
    async with raw_channel(outsider.identity) as channel, refused(Reason.NOT_IN_COHORT):
        await upload(channel, good.header, [good.content])
    await finish(live, good)
    async with refused(Reason.WRONG_ROUND):  # the run is over
        await upload(live.channel, good.header, [good.content])


async def test_an_agent_cannot_read_an_update(live: Live) -> None:
    good = live.update()
    parts = pieces(good.content, 4000)
    await upload(live.channel, good.header, parts[:1], cut_when=lambda: held(live) > 0)
    await finish(live, good)
    stub = artifact_pb2_grpc.ArtifactServiceStub(live.channel)
    for wanted in (good.header.sha256, hashlib.sha256(parts[0]).digest()):
        async with refused(Reason.NOT_FOUND):
            async for _ in stub.DownloadArtifact(
                artifact_pb2.DownloadArtifactRequest(sha256=wanted)
            ):
                pass
