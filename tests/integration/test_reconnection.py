"""Agents that are cut, that are started again, that come late or not at all."""

from typing import Any

import numpy as np
import pytest

from coordinator.published import PublishedFolder
from coordinator.round_sum import RoundSum
from coordinator.run_state import Phase
from edge_agent.global_state import GlobalState
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from tests.integration.engines import FakeEngine, Gate
from tests.integration.federation import Agent, Federation, until, weighted_mean

# What each phase waits for, so that a test can hold it there.
HELD: dict[Phase, tuple[type, str]] = {
    Phase.TRAINING: (FakeEngine, "train"),
    Phase.COLLECTING: (RoundSum, "_add"),
    Phase.SUMMING: (PublishedFolder, "put"),
    Phase.APPLYING: (GlobalState, "apply"),
}


def hold(monkeypatch: pytest.MonkeyPatch, phase: Phase) -> Gate:
    """Hold the product in a phase until the gate opens."""
    gate, (owner, name) = Gate(), HELD[phase]
    original = getattr(owner, name)

    def held(*arguments: Any) -> Any:
        gate.wait()
        return original(*arguments)

    monkeypatch.setattr(owner, name, held)
    return gate


async def cut(federation: Federation, agent: Agent) -> None:
    """End the agent's control stream and wait until it is back."""
    conductor = federation.conductor
    assert conductor is not None
    sessions = conductor._sessions
    session = sessions.get(agent.name)
    assert session is not None
    session.send(Refused(Reason.INTERNAL, "cut by the test"))
    await until("a new session", lambda: sessions.get(agent.name) not in (None, session))


async def start_again(federation: Federation, agent: Agent) -> None:
    """End the agent's process, as far as the coordinator can see, and start another."""
    await agent.stop()
    agent.start()
    await federation.connected([agent])


async def all_complete(federation: Federation, run_id: bytes, agents: list[Agent]) -> Theta:
    """Wait for the run's end and return the theta on which all agents agree, bit by bit."""
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    theta = agents[0].theta(run_id)
    for agent in agents[1:]:
        assert np.array_equal(agent.theta(run_id), theta)
    return theta


def expected_theta(federation: Federation, cohorts: list[list[Agent]]) -> Theta:
    """Average what the cohorts of a run trained, round by round."""
    theta = federation.initial_theta()
    for cohort in cohorts:
        theta = theta + weighted_mean(cohort, theta)
    return theta


@pytest.mark.parametrize("interrupt", [cut, start_again])
@pytest.mark.parametrize("kind", ["plain", "encrypted", "sealed"])
@pytest.mark.parametrize("phase", list(HELD), ids=lambda phase: phase.value)
async def test_an_agent_that_is_away_in_any_phase_loses_nothing(
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    phase: Phase,
    kind: str,
    interrupt: Any,
) -> None:
    agents = await federation.enrol_all()
    run_id = federation.start_run(kind, rounds=2)
    gate = hold(monkeypatch, phase)
    for agent in agents:
        agent.start()
    await until(
        "the phase", lambda: gate.entered.is_set() and federation.run(run_id).phase is phase
    )
    await interrupt(federation, agents[1])
    gate.open.set()
    theta = await all_complete(federation, run_id, agents)
    assert [len(record.slots) for record in federation.store.rounds(run_id)] == [3, 3]
    if kind == "plain":
        assert np.array_equal(theta, expected_theta(federation, [agents, agents]))


@pytest.mark.parametrize("interrupt", [cut, start_again])
async def test_an_agent_that_is_away_while_others_are_waited_for(
    federation: Federation, interrupt: Any
) -> None:
    agents = await federation.enrol_all()
    run_id = federation.start_run("encrypted", rounds=1)
    for agent in agents[:2]:
        agent.start()
    await federation.connected(agents[:2])
    await interrupt(federation, agents[1])
    agents[2].start()
    await all_complete(federation, run_id, agents)


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
async def test_a_late_agent_catches_up_from_the_history(federation: Federation, kind: str) -> None:
    agents = await federation.enrol_all()
    late = agents[2]
    run_id = federation.start_run(kind, rounds=3, minimum=2)
    agents[0].engine.pauses_at = 2
    for agent in agents[:2]:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    late.start()
    await federation.connected([late])
    agents[0].engine.may_finish.set()
    theta = await all_complete(federation, run_id, agents)
    members = [len(record.slots) for record in federation.store.rounds(run_id)]
    assert members == [2, 2, 3]
    assert len(late.engine.history) == 1
    if kind == "plain":
        cohorts = [agents[:count] for count in members]
        assert np.array_equal(theta, expected_theta(federation, cohorts))


async def test_an_agent_that_vanishes_while_training_is_not_waited_for_for_ever(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    lost = agents[1]
    lost.engine.may_finish.clear()
    run_id = federation.start_run("encrypted", rounds=2, minimum=2, training=1.5)
    for agent in agents:
        agent.start()
    await until("the lost agent to train", lost.engine.training.is_set)
    await lost.stop()
    await all_complete(federation, run_id, [agents[0], agents[2]])
    assert [len(record.slots) for record in federation.store.rounds(run_id)] == [2, 2]


async def test_everybody_who_is_connected_is_invited_to_the_first_round(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    await all_complete(federation, run_id, agents)
    [record] = federation.store.rounds(run_id)
    assert record.slots == (0, 1, 2)


async def test_runs_are_executed_one_after_another_by_the_same_sessions(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    runs = [federation.start_run(kind, rounds=1) for kind in ("plain", "encrypted", "plain")]
    for agent in agents:
        agent.start()
    for run_id in runs:
        await all_complete(federation, run_id, agents)
