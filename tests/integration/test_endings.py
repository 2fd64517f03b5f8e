"""How a run ends for those who missed its end, or a part of it: all come to the same adapter."""

import numpy as np
import pytest

from coordinator.run_state import Phase
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from tests.integration.federation import Federation, until
from tests.integration.test_reconnection import hold


async def test_a_coordinator_restarted_before_the_last_answers_tells_all_of_the_end(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all()
    run_id = federation.start_run("plain", rounds=1)
    gate = hold(monkeypatch, Phase.APPLYING)
    for agent in agents:
        agent.start()
    await until("applying", gate.entered.is_set)
    await federation.stop()
    gate.open.set()
    await federation.start()
    await federation.run_over(run_id)
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
        assert np.array_equal(agent.theta(run_id), agents[0].theta(run_id))


async def test_an_agent_that_was_away_at_the_end_hears_of_it_when_it_comes_back(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = await federation.enrol_all()
    run_id = federation.start_run("plain", rounds=1)
    gate = hold(monkeypatch, Phase.APPLYING)
    for agent in agents:
        agent.start()
    await until("applying", gate.entered.is_set)
    await agents[1].stop()
    gate.open.set()
    await federation.run_over(run_id)
    agents[1].start()
    assert (await agents[1].finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert np.array_equal(agents[1].theta(run_id), agents[0].theta(run_id))


async def test_an_agent_that_declined_a_part_exports_the_run_s_adapter_all_the_same(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    agents[1].engine.pauses_at = 2
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    run_id = federation.start_run("plain", rounds=4, minimum=2)
    waiting = lambda: agents[1].engine.begun == 2 and len(agents[0].engine.history) == 2  # noqa: E731
    await until("round 2", waiting)
    agents[0].engine.refusal = Refused(Reason.DATA_UNREADABLE, "unplugged")
    agents[1].engine.may_finish.set()
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert len(federation.store.rounds(run_id)[-1].slots) == 2
    assert np.array_equal(agents[0].theta(run_id), agents[1].theta(run_id))
