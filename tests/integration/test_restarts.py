"""A coordinator that stops, or is killed, in the middle of a run: the run goes on by itself."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.run_state import Phase
from coordinator.store import RoundRecord, Store
from fedloom.adapters import Theta
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation, until, weighted_mean
from tests.integration.processes import coordinator


async def all_agree(federation: Federation, run_id: bytes, agents: list[Agent]) -> Theta:
    """Wait until everybody has completed the run; return the theta that all of them have."""
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    theta = agents[0].theta(run_id)
    for agent in agents[1:]:
        assert np.array_equal(agent.theta(run_id), theta)
    return theta


def mean_of_all(federation: Federation, agents: list[Agent], rounds: int) -> Theta:
    """Average what all agents trained in all rounds, as if nothing had happened."""
    theta = federation.initial_theta()
    for _ in range(rounds):
        theta = theta + weighted_mean(agents, theta)
    return theta


@pytest.mark.parametrize("kind", ["plain", "encrypted", "sealed"])
async def test_a_run_goes_on_after_the_coordinator_was_stopped(
    federation: Federation, kind: str
) -> None:
    agents = await federation.enrol_all()
    agents[0].engine.pauses_at = 2
    run_id = federation.start_run(kind, rounds=3)
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    await federation.stop()
    agents[0].engine.may_finish.set()
    await federation.start()
    theta = await all_agree(federation, run_id, agents)
    records = federation.store.rounds(run_id)
    assert [record.round for record in records] == [1, 2, 3]
    if kind == "plain":
        assert np.array_equal(theta, mean_of_all(federation, agents, rounds=3))
    makers = set(federation.store.envelopes(run_id).get(1, {}))
    assert makers == ({agent.name for agent in agents} if kind != "plain" else set())


async def stored(federation: Federation, run_id: bytes, rounds: int) -> None:
    """Wait until the history holds so many rounds."""
    await until(f"{rounds} rounds", lambda: len(federation.store.rounds(run_id)) >= rounds)


@pytest.mark.parametrize("kind", ["plain", "encrypted", "sealed"])
async def test_a_run_goes_on_after_its_coordinator_was_killed_in_every_round(
    federation: Federation, tmp_path: Path, kind: str
) -> None:
    agents = await federation.enrol_all()
    await federation.stop()  # it gets a process of its own
    agents[2].engine.pauses_at = 3  # so that it is never over before it is killed
    run_id = federation.start_run(kind, rounds=3)
    for agent in agents:
        agent.start()
    for number in (1, 2):
        async with coordinator(federation, tmp_path / "coordinator.log") as process:
            await stored(federation, run_id, number)
            process.kill()
            await process.wait()
    agents[2].engine.may_finish.set()
    agents[2].engine.pauses_at = 0
    async with coordinator(federation, tmp_path / "coordinator.log") as process:
        theta = await all_agree(federation, run_id, agents)
        assert await process.wait() == 0
    if kind == "plain":
        assert np.array_equal(theta, mean_of_all(federation, agents, rounds=3))


async def test_agents_and_coordinator_may_all_be_started_again(federation: Federation) -> None:
    agents = await federation.enrol_all()
    agents[0].engine.pauses_at = 2
    run_id = federation.start_run("encrypted", rounds=2)
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[0].engine.begun == 2)
    await federation.stop()
    for agent in agents:
        await agent.stop()
        agent.engine.may_finish.set()
    await federation.start()
    for agent in agents:
        agent.start()
    await all_agree(federation, run_id, agents)


async def test_a_coordinator_that_cannot_store_a_round_ends_and_goes_on_when_started_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Store, run_id: bytes, record: RoundRecord) -> None:
        raise RuntimeError("no such table")

    agents = await federation.enrol_all()
    run_id = federation.start_run("encrypted", rounds=1)
    with monkeypatch.context() as faulty:
        faulty.setattr(Store, "add_round", broken)
        for agent in agents:
            agent.start()
        await until("the coordinator to give up", federation.gave_up)
        with pytest.raises(RuntimeError, match="no such table"):
            await federation.stop()
    await federation.start()
    await all_agree(federation, run_id, agents)
