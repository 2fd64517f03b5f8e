"""Runs under masks: who vanishes when, and what a member may not say."""

import stat
from typing import Any

import numpy as np
import pytest

from coordinator.run_state import Phase
from crypto import cohort
from crypto.masks import Mask
from edge_agent.contribution import Contribution
from edge_agent.engine import LocalUpdate
from edge_agent.invitations import read_cohort
from edge_agent.participation import Participation
from edge_agent.protection import Place
from edge_agent.run_keys import MAX_REFUSED_SUMS, RunKeys
from edge_agent.undertaking import Interrupted, Undertaking
from fedloom.errors import Reason
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation, until
from tests.integration.test_rounds import complete

FOUR = (30, 50, 100, 70)


def silence(monkeypatch: pytest.MonkeyPatch, agent: Agent, *kinds: type[cohort.Message]) -> None:
    """Let one agent not hear these messages of the cohort's protocol: it has vanished there."""
    original = Participation.mask_step

    async def deaf(self: Participation, message: control_pb2.MaskStep) -> None:
        mine = self._device.identity.agent_id == agent.name
        if not mine or not isinstance(cohort.decode(message.message), kinds):
            await original(self, message)

    monkeypatch.setattr(Participation, "mask_step", deaf)


async def ends(federation: Federation, agents: list[Agent], **terms: Any) -> bytes:
    """Run one sealed round in which the last agent vanishes at some step."""
    for agent in agents:
        agent.start()
    await federation.connected(agents)  # all in one cohort: a run starts with those who are here
    run_id = federation.start_run("sealed", rounds=1, upload=1.5, applying=1.5, **terms)
    await federation.run_over(run_id)
    return run_id


async def test_who_vanishes_before_uploading_is_left_out(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all(FOUR)
    silence(monkeypatch, agents[3], cohort.Boxes)
    run_id = await ends(federation, agents)
    assert federation.run(run_id).phase is Phase.COMPLETED
    (record,) = federation.store.rounds(run_id)
    assert record.slots == (0, 1, 2)
    states = [agent.theta(run_id) for agent in agents[:3] if await agent.finished()]
    assert all(np.array_equal(state, states[0]) for state in states)


async def test_who_vanishes_after_uploading_stays_in_the_sum(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all(FOUR)
    silence(monkeypatch, agents[3], cohort.Acceptance, cohort.Certificate)
    run_id = await ends(federation, agents)
    assert federation.run(run_id).phase is Phase.COMPLETED
    (record,) = federation.store.rounds(run_id)
    assert record.slots == (0, 1, 2, 3)
    states = [agent.theta(run_id) for agent in agents[:3] if await agent.finished()]
    assert all(np.array_equal(state, states[0]) for state in states)


async def test_without_a_quorum_that_vouches_nothing_is_opened(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all(FOUR[:3])
    silence(monkeypatch, agents[2], cohort.Acceptance)
    run_id = await ends(federation, agents, training=5.0, gathering=5.0)
    record = federation.run(run_id)
    assert (record.phase, record.reason) == (Phase.FAILED, Reason.QUORUM_NOT_REACHED)
    assert federation.store.rounds(run_id) == ()


async def test_a_late_agent_opens_the_sums_of_cohorts_that_it_was_no_member_of(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all(FOUR)
    agents[0].engine.pauses_at = 2
    run_id = federation.start_run("sealed", rounds=3)
    for agent in agents[:3]:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    agents[3].start()
    await federation.connected(agents)
    agents[0].engine.may_finish.set()
    await complete_all(federation, run_id, agents)


async def complete_all(federation: Federation, run_id: bytes, agents: list[Agent]) -> None:
    """Wait for everybody's end; all have the same adapter."""
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    states = [agent.theta(run_id) for agent in agents]
    assert all(np.array_equal(state, states[0]) for state in states)


async def test_a_member_that_says_what_it_may_not_harms_nobody(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all(FOUR)
    original = Contribution._send_mask_step

    def chatty(self: Contribution, round_number: int, message: bytes) -> None:
        if self._here.agent_id == agents[3].name:
            stated = cohort.decode(message)
            foreign = stated.encode()[:28] + b"\0\0" + stated.encode()[30:]  # another's slot
            for wrong in (b"", b"garbage", message[:-1], message + b"\0", foreign):
                original(self, round_number, wrong)
        original(self, round_number, message)

    monkeypatch.setattr(Contribution, "_send_mask_step", chatty)
    run_id = federation.start_run("sealed", rounds=2)
    await complete(federation, run_id, agents)


async def test_an_update_that_comes_before_all_shares_are_dealt_is_refused(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all(FOUR)
    give, refused = Contribution.give, []

    async def hasty(
        self: Contribution, run: Undertaking, message: control_pb2.Cohort, update: LocalUpdate
    ) -> None:
        if self._here.agent_id == agents[3].name:
            formed = read_cohort(message)
            place = Place(3, cohort.decode(message.mask_cohort).digest, (Mask(bytes(32)),))
            early = await self._encode(run, formed, place, update)
            with pytest.raises(Interrupted) as interrupted:
                await self._upload(formed, early)
            refused.append(interrupted.value.__cause__)
            self._encoded = None
        await give(self, run, message, update)

    monkeypatch.setattr(Contribution, "give", hasty)
    run_id = federation.start_run("sealed", rounds=1)
    await complete(federation, run_id, agents)
    assert "shares of all members" in str(refused[0])
    (record,) = federation.store.rounds(run_id)
    assert (record.attempt, record.slots) == (1, (0, 1, 2, 3))


async def test_what_a_member_promised_is_kept_where_only_its_owner_reads(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all(FOUR[:3])
    run_id = federation.start_run("sealed", rounds=1)
    await complete(federation, run_id, agents)
    for agent in agents:
        state = agent.home / "runs" / run_id.hex() / "masks.state"
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        kept = cohort.MemberState.decode(state.read_bytes())
        assert kept.phase is cohort.MemberPhase.RELEASED
        assert kept.secret == b""
        assert stat.S_IMODE((agent.home / "identity.key").stat().st_mode) == 0o600


async def test_a_spent_run_key_is_replaced_and_the_run_goes_on(federation: Federation) -> None:
    agents = await federation.enrol_all(FOUR)
    run_id = federation.start_run("sealed", rounds=2)
    spent = agents[3].home / "runs" / run_id.hex()
    spent.mkdir(parents=True)
    keys = RunKeys(spent, agents[3].identity, run_id)
    for _ in range(MAX_REFUSED_SUMS):
        keys.count_refused_sum(1)
    await complete(federation, run_id, agents)
    records = federation.store.rounds(run_id)
    assert len(records[-1].slots) == 4
    assert records[-1].key_id == 2
