"""What an agent declines, and what becomes of the round without it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crypto
from coordinator import announcements
from coordinator.published import PublishedFolder
from coordinator.round_sum import RoundSum
from coordinator.run_state import Phase
from edge_agent.engine import LocalUpdate
from edge_agent.identity import Identity
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.plans import ADAPTER_FILE
from fedloom.terms import Protection
from fedloom.v1 import control_pb2
from tests.integration.engines import FakeEngine
from tests.integration.federation import Agent, Federation, until, weighted_mean
from tests.integration.raw import RawControl, raw_channel


async def begin(federation: Federation, agents: list[Agent], kind: str, minimum: int) -> bytes:
    """Connect all agents, then start a run of one round that does not wait long for a quorum."""
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    return federation.start_run(kind, rounds=1, minimum=minimum, gathering=0.5)


async def fails(federation: Federation, run_id: bytes, agents: list[Agent], why: Reason) -> None:
    """The run fails, everybody hears why, and nobody's state has moved."""
    record = await federation.run_over(run_id)
    assert (record.phase, record.reason) == (Phase.FAILED, why)
    for agent in agents:
        finished = await agent.finished()
        assert finished.outcome == control_pb2.RUN_OUTCOME_FAILED
        assert Reason(finished.reason.reason) is why
        assert not (agent.home / "models").exists()
        assert not list((agent.home / "runs" / run_id.hex()).glob("after-round-*"))


async def completes_without(
    federation: Federation, run_id: bytes, declining: Agent, others: list[Agent]
) -> None:
    """The run completes, and the sum is of the others' updates alone."""
    for agent in others:
        finished = await agent.finished()
        assert finished.outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    [record] = federation.store.rounds(run_id)
    assert len(record.slots) == len(others)
    theta = federation.initial_theta()
    expected = theta + weighted_mean(others, theta)
    for agent in others:
        assert np.abs(agent.theta(run_id) - expected).max() < 1e-6
    sent = {row["agent_id"]: row["sent_bytes"] for row in federation.store.reports(run_id)}
    assert not sent.get(declining.name)


def refusals(federation: Federation, run_id: bytes) -> dict[str, int | None]:
    """Return what each agent declined with."""
    return {row["agent_id"]: row["refusal"] for row in federation.store.reports(run_id)}


# the plan


@pytest.mark.parametrize("what", ["member", "plan"])
async def test_a_plan_that_is_not_what_its_hash_says(federation: Federation, what: str) -> None:
    agents = await federation.enrol_all()
    run_id = await opened(federation)
    wanted = federation.run(run_id).plan.sha256
    if what == "member":
        wanted = federation.plan.member(ADAPTER_FILE).sha256
    with federation.tampered(wanted):
        for agent in agents:
            agent.start()
        await fails(federation, run_id, agents, Reason.QUORUM_NOT_REACHED)
    assert set(refusals(federation, run_id).values()) == {Reason.PLAN_MISMATCH}
    # The right bytes are accepted afterwards: nothing wrong was kept.
    again = federation.start_run("plain", rounds=1)
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert federation.run(again).phase is Phase.COMPLETED


async def opened(federation: Federation) -> bytes:
    """Start a run that gathers, so that its plan has been read."""
    run_id = federation.start_run("plain", rounds=1, minimum=3, gathering=2)
    conductor = federation.conductor
    assert conductor is not None
    await until("the run to open", lambda: conductor._open)
    return run_id


async def test_a_run_whose_plan_the_coordinator_has_lost_fails_and_the_next_one_runs(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    await federation.stop()
    run_id = federation.start_run("plain", rounds=1)
    with federation.tampered(federation.run(run_id).plan.sha256):
        await federation.start()
        record = await federation.run_over(run_id)
        assert (record.phase, record.reason) == (Phase.FAILED, Reason.PLAN_MISMATCH)
    federation.start_run("plain", rounds=1)
    for agent in agents:
        agent.start()
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED


async def test_a_plan_that_is_gone(federation: Federation) -> None:
    agents = await federation.enrol_all()
    run_id = await opened(federation)
    PublishedFolder(federation.home / "artifacts").path(
        federation.plan.member(ADAPTER_FILE).sha256
    ).unlink()
    for agent in agents:
        agent.start()
    await fails(federation, run_id, agents, Reason.QUORUM_NOT_REACHED)
    assert set(refusals(federation, run_id).values()) == {Reason.NOT_FOUND}


# the sum


@pytest.mark.parametrize(
    ("kind", "place"),
    [("plain", 0.0), ("plain", 1.0), ("encrypted", 0.0), ("encrypted", 0.3), ("encrypted", 0.6)],
    ids=["plain-header", "plain-nan", "header", "counters", "values"],
)
async def test_a_sum_that_was_tampered_with_before_it_was_published(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str, place: float
) -> None:
    encoded = RoundSum.encoded

    def tampered(self: RoundSum, correction: Any) -> Iterator[bytes]:
        content = bytearray(b"".join(encoded(self, correction)))
        start = int(place * (len(content) - 4))
        content[start : start + 4] = bytes(b ^ 0x55 for b in content[start : start + 4])
        if place == 1.0:
            content[start:] = b"\xff\xff\xff\x7f"
        return iter([bytes(content)])

    monkeypatch.setattr(RoundSum, "encoded", tampered)
    agents = await federation.enrol_all()
    run_id = await begin(federation, agents, kind, minimum=3)
    await fails(federation, run_id, agents, Reason.SUM_NOT_VERIFIED)


async def test_a_sum_that_was_tampered_with_after_it_was_published(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = PublishedFolder.put

    def tampered(self: PublishedFolder, parts: Iterator[bytes]) -> ArtifactReference:
        reference = put(self, parts)
        path: Path = self.path(reference.sha256)
        path.write_bytes(bytes(reference.size_bytes))
        return reference

    agents = await federation.enrol_all()
    run_id = await begin(federation, agents, "encrypted", minimum=3)
    monkeypatch.setattr(PublishedFolder, "put", tampered)
    await fails(federation, run_id, agents, Reason.DIGEST_MISMATCH)


# the run key


async def test_a_run_key_from_outside_the_federation(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Federation(tmp_path / "other")
    await other.start()
    foreign = (await other.enrol("agent-0")).identity
    agents = await federation.enrol_all()
    devices = {agent.name: agent.identity for agent in agents}
    invite = announcements.invitation

    def forged(*arguments: Any) -> control_pb2.ConnectResponse:
        message = invite(*arguments)
        for envelope in message.invitation.envelopes:
            recipient = devices[envelope.recipient_id]
            envelope.ParseFromString(
                forged_envelope(foreign, recipient, message.invitation.run_id, envelope.key_id)
            )
        return message

    monkeypatch.setattr(announcements, "invitation", forged)
    run_id = await begin(federation, agents, "encrypted", minimum=3)
    await fails(federation, run_id, agents, Reason.QUORUM_NOT_REACHED)
    assert set(refusals(federation, run_id).values()) == {Reason.KEY_UNAVAILABLE}
    await other.close()


def forged_envelope(sender: Identity, recipient: Identity, run_id: bytes, key_id: int) -> bytes:
    """Wrap a known key as the coordinator's accomplice would, who holds no certificate of ours."""
    context = crypto.WrapContext(run_id, key_id, sender.agent_id, recipient.agent_id)
    public = recipient.exchange_key.public_key().public_bytes_raw()
    known = crypto.RunKey(bytes(32))
    return control_pb2.KeyEnvelope(
        sender_id=sender.agent_id,
        sender_key=sender.advertised_exchange_key(),
        recipient_id=recipient.agent_id,
        wrapped=crypto.wrap(known, sender.exchange_key, public, context),
        key_id=key_id,
    ).SerializeToString()


async def test_a_recipient_whose_key_does_not_verify_gets_no_run_key(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    mallory = await federation.enrol("mallory")
    stranger = crypto.generate_exchange_key().public_key().public_bytes_raw()
    key = mallory.identity.advertised_exchange_key()
    key.public_key = stranger  # signed is another one
    async with raw_channel(mallory.identity) as channel:
        control = RawControl(channel)
        await control.hello(mallory.identity, exchange_key=key)
        run_id = await begin(federation, agents, "encrypted", minimum=3)
        await completes_without(federation, run_id, mallory, agents)
        assert sorted(federation.store.envelopes(run_id)[1]) == [a.name for a in agents]
        assert (await control.receive("finished")).finished.run_id == run_id


# the device's data, policy and training

DATA = [reason for reason in Reason if reason.name.startswith("DATA_")]


@pytest.mark.parametrize("reason", [*DATA, Reason.TRAINING_FAILED, Reason.PLAN_UNSUPPORTED])
async def test_an_engine_that_refuses_does_not_stop_the_others(
    federation: Federation, reason: Reason
) -> None:
    agents = await federation.enrol_all()
    agents[0].engine.refusal = Refused(reason, "expected better")
    run_id = await begin(federation, agents, "plain", minimum=2)
    await completes_without(federation, run_id, agents[0], agents[1:])
    assert refusals(federation, run_id)[agents[0].name] == reason


async def test_too_few_agents_fail_the_run(federation: Federation) -> None:
    agents = await federation.enrol_all()
    agents[0].engine.refusal = Refused(Reason.DATA_EMPTY, "expected a row")
    run_id = await begin(federation, agents, "plain", minimum=3)
    await fails(federation, run_id, agents, Reason.QUORUM_NOT_REACHED)
    assert refusals(federation, run_id)[agents[0].name] == Reason.DATA_EMPTY


async def test_a_device_declines_less_protection_than_its_policy_demands(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    agents[2].minimum_protection = Protection.ENCRYPTED
    run_id = await begin(federation, agents, "plain", minimum=2)
    await completes_without(federation, run_id, agents[2], agents[:2])
    assert refusals(federation, run_id)[agents[2].name] == Reason.PROTECTION_TOO_WEAK
    assert agents[2].engine.history == []
    assert not (agents[2].home / "plans").exists()


def with_nan(update: LocalUpdate) -> LocalUpdate:
    """Break one value."""
    delta = update.delta.copy()
    delta[-1] = np.nan
    return replace(update, delta=delta)


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_nan, Reason.NOT_FINITE),
        (lambda update: replace(update, mean_loss=float("nan")), Reason.TRAINING_FAILED),
        (lambda update: replace(update, samples=0), Reason.WEIGHT_OUT_OF_RANGE),
        (lambda update: replace(update, samples=1 << 25), Reason.WEIGHT_OUT_OF_RANGE),
        (lambda update: replace(update, delta=update.delta[1:]), Reason.INTERNAL),
    ],
    ids=["nan", "nan-loss", "no-samples", "too-many-samples", "wrong-shape"],
)
async def test_an_unusable_update_never_leaves_the_device(
    federation: Federation,
    kind: str,
    spoil: Callable[[LocalUpdate], LocalUpdate],
    reason: Reason,
) -> None:
    agents = await federation.enrol_all()
    agents[1].engine = FakeEngine(samples=50, spoil=spoil)
    run_id = await begin(federation, agents, kind, minimum=2)
    await completes_without(federation, run_id, agents[1], [agents[0], agents[2]])
    assert refusals(federation, run_id)[agents[1].name] == reason
