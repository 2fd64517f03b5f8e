"""Uploads that meet a cut or the cohort's end at the worst moment; the sum stays what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coordinator.published import PublishedFolder
from coordinator.round_sum import RoundSum
from coordinator.run_state import Phase
from edge_agent.protection import UpdateProtection
from fedloom.artifacts import PART_BYTES, ArtifactReference
from fedloom.errors import Reason
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc, control_pb2, refusal_pb2
from tests.integration.engines import Gate
from tests.integration.federation import Agent, Federation, until, weighted_mean
from tests.integration.raw import (
    RawControl,
    encoded_update,
    pieces,
    raw_channel,
    refused,
    upload_of,
)

PEER = 2  # its slot: members are in the order of their names


async def collecting(
    federation: Federation, control: RawControl, peer: Agent
) -> control_pb2.Cohort:
    """Bring a run of two agents and the peer to where the peer's update is waited for."""
    for i, samples in enumerate((16, 32)):
        (await federation.enrol(f"honest-{i}", samples)).start()
    await control.hello(peer.identity)
    await federation.connected(federation.agents)
    run_id = federation.start_run("plain", rounds=1, minimum=2)
    await control.receive("invitation")
    await control.send(ready=control_pb2.Ready(run_id=run_id, round=1, weight_class=5))
    return (await control.receive("cohort")).cohort


async def test_an_agent_that_is_cut_while_its_update_is_added_is_in_the_sum(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, add = Gate(), RoundSum._add

    def held(self: RoundSum, slot: int, path: Path) -> None:
        if slot == PEER:
            gate.wait()
        add(self, slot, path)

    monkeypatch.setattr(RoundSum, "_add", held)
    peer = await federation.enrol("peer")
    async with raw_channel(peer.identity) as channel:
        control = RawControl(channel)
        cohort = await collecting(federation, control, peer)
        update = upload_of(cohort, encoded_update(federation.plan, cohort, PEER, 0.125, 32))
        call = artifact_pb2_grpc.ArtifactServiceStub(channel).UploadArtifact()
        await call.write(artifact_pb2.UploadArtifactRequest(header=update.header))
        for part in pieces(update.content, PART_BYTES):
            await call.write(artifact_pb2.UploadArtifactRequest(part=part))
        await until("the update to be added", gate.entered.is_set)
        call.cancel()
    await federation.gone(peer)
    gate.open.set()
    await until("the run to end", lambda: federation.run(cohort.run_id).phase.over)
    assert federation.run(cohort.run_id).phase is Phase.COMPLETED
    [record] = federation.store.rounds(cohort.run_id)
    assert record.slots == (0, 1, 2)


@pytest.mark.parametrize("over", [False, True], ids=["while summing", "after the run"])
async def test_an_update_that_ends_after_the_cohort_was_closed_does_not_touch_the_sum(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    gate, put = Gate(), PublishedFolder.put

    def held(self: PublishedFolder, parts: Iterator[bytes]) -> ArtifactReference:
        gate.wait()
        return put(self, parts)

    monkeypatch.setattr(PublishedFolder, "put", held)
    gate.open.set()  # for the plan
    peer = await federation.enrol("peer")
    async with raw_channel(peer.identity) as channel:
        control = RawControl(channel)
        cohort = await collecting(federation, control, peer)
        gate.open.clear()
        gate.entered.clear()
        update = upload_of(cohort, encoded_update(federation.plan, cohort, PEER, 0.125, 32))
        call = artifact_pb2_grpc.ArtifactServiceStub(channel).UploadArtifact()
        await call.write(artifact_pb2.UploadArtifactRequest(header=update.header))
        assert isinstance(await call.read(), artifact_pb2.UploadArtifactResponse)
        await decline(control, cohort)  # the cohort closes without the peer
        await until("the sum to be stored", gate.entered.is_set)
        if over:
            gate.open.set()
            await federation.run_over(cohort.run_id)
        async with refused(Reason.WRONG_ROUND):
            await call.write(artifact_pb2.UploadArtifactRequest(part=update.content))
            await call.read()
        gate.open.set()
        assert (await control.receive("accepted")).accepted.updates
    honest = federation.agents[1:]
    for agent in honest:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    theta = federation.initial_theta()
    expected = theta + weighted_mean(honest, theta)
    for agent in honest:
        assert np.array_equal(agent.theta(cohort.run_id), expected)


async def test_an_agent_that_declines_while_its_update_waits_is_not_in_the_sum(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, add = Gate(), RoundSum._add

    def held(self: RoundSum, slot: int, path: Path) -> None:
        if slot != PEER:
            gate.wait()
        add(self, slot, path)

    monkeypatch.setattr(RoundSum, "_add", held)
    peer = await federation.enrol("peer")
    async with raw_channel(peer.identity) as channel:
        control = RawControl(channel)
        cohort = await collecting(federation, control, peer)
        await until("another update to be added", gate.entered.is_set)
        update = upload_of(cohort, encoded_update(federation.plan, cohort, PEER, 0.125, 32))
        call = artifact_pb2_grpc.ArtifactServiceStub(channel).UploadArtifact()
        await call.write(artifact_pb2.UploadArtifactRequest(header=update.header))
        await call.write(artifact_pb2.UploadArtifactRequest(part=update.content))
        assert isinstance(await call.read(), artifact_pb2.UploadArtifactResponse)
        spool = federation.home / "spool" / cohort.run_id.hex()
        await until("the update to wait", lambda: list(spool.rglob(f"{PEER}.*.update")))
        await decline(control, cohort)
        await until("the refusal", lambda: refusal_of(federation, cohort, peer))
        gate.open.set()
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
    assert (await federation.run_over(cohort.run_id)).phase is Phase.COMPLETED
    [record] = federation.store.rounds(cohort.run_id)
    assert record.slots == (0, 1)


async def decline(control: RawControl, cohort: control_pb2.Cohort) -> None:
    """Refuse the round that this cohort belongs to."""
    details = refusal_pb2.RefusalDetails(reason=refusal_pb2.REASON_TRAINING_FAILED)
    declined = control_pb2.StepRefusal(run_id=cohort.run_id, round=1, details=details)
    await control.send(refusal=declined)


def refusal_of(federation: Federation, cohort: control_pb2.Cohort, agent: Agent) -> int | None:
    """Return the reason with which the agent declined, once the coordinator knows it."""
    reports = federation.store.reports(cohort.run_id)
    return next((row["refusal"] for row in reports if row["agent_id"] == agent.name), None)


async def test_an_agent_that_is_too_late_once_takes_part_in_the_next_round(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = Gate(), UpdateProtection.write_update

    def held(self: UpdateProtection, *arguments: Any) -> ArtifactReference:
        if slow.home in arguments[-1].parents:
            gate.wait()
        return write(self, *arguments)

    agents = await federation.enrol_all()
    slow = agents[2]
    monkeypatch.setattr(UpdateProtection, "write_update", held)
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    run_id = federation.start_run("encrypted", rounds=2, minimum=2, upload=2.5)
    await until("the cohort to close", lambda: federation.store.rounds(run_id))
    gate.open.set()
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    slots = [record.slots for record in federation.store.rounds(run_id)]
    assert slots == [(0, 1), (0, 1, 2)]
    for agent in agents[1:]:
        assert np.array_equal(agent.theta(run_id), agents[0].theta(run_id))
