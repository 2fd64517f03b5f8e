"""Whole runs in which not everybody is invited, stays, or has time."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import pacing
from coordinator.run_state import Phase
from edge_agent import absence
from edge_agent.availability import Availability, Window
from edge_agent.status import Link, read_status
from fedloom.adapters import Theta
from fedloom.errors import Reason
from fedloom.v1 import control_pb2
from fedloom.version import PROTOCOL_VERSION
from tests.integration.federation import Agent, Federation, command, until
from tests.integration.raw import RawControl, raw_channel, refused

RUN = """
name = "toy"
plan = "plan"
rounds = {rounds}
[cohort]
minimum = 3
size = 3
[selection]
{selection}
[training]
learning_rate = 1e-2
[protection]
kind = "{kind}"
"""


def start(federation: Federation, kind: str, selection: str, rounds: int = 1) -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(kind=kind, selection=selection, rounds=rounds))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


def phase_of(federation: Federation, run_id: bytes) -> Phase | None:
    assert federation.conductor is not None
    state = federation.conductor.state_of(run_id)
    return None if state is None else state.phase


def invited(federation: Federation, run_id: bytes) -> frozenset[str]:
    assert federation.conductor is not None
    state = federation.conductor.state_of(run_id)
    return frozenset() if state is None else state.invited


def is_connected(federation: Federation, agent: Agent) -> bool:
    assert federation.conductor is not None
    return federation.conductor._sessions.get(agent.name) is not None


def expect_means_of(
    federation: Federation, theta: Theta, agents: Sequence[Agent], rounds: int = 1
) -> None:
    """Expect the plan's adapter, moved in each round by the mean of these agents' updates."""
    expected = federation.initial_theta().astype(np.float64)
    for number in range(rounds):
        updates = [agent.engine.history[number].update for agent in agents]
        expected += np.average(
            [update.delta for update in updates], 0, [update.samples for update in updates]
        )
    np.testing.assert_allclose(theta, expected, rtol=0, atol=4e-6)


class Hours(Availability):
    """Hours that a test opens and closes."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "closed", False)

    def close(self, closed: bool) -> None:
        object.__setattr__(self, "closed", closed)

    def why_not(self, now: datetime, power: Path = Path()) -> str:
        closed: bool = self.closed  # type: ignore[attr-defined]
        return "closed by the test" if closed else ""


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absence, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(absence, "OPENING_SECONDS", 0.05)
    monkeypatch.setattr(absence, "FIRST_OPENING_SECONDS", 0.05)


@pytest.mark.parametrize("kind", ["plain", "masked", "encrypted", "sealed"])
async def test_a_cohort_closes_without_the_slowest(federation: Federation, kind: str) -> None:
    agents = await federation.enrol_all((30, 50, 100, 70))
    *fast, slow = agents
    slow.engine.may_finish.clear()
    for agent in agents:  # all are here before there is a run: the first three would do for it
        agent.start()
    await federation.connected(agents)
    run_id = start(federation, kind, "over_selection = 1.3", rounds=2)
    await federation.run_over(run_id)
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert slow.engine.begun >= 1, "expected it to be invited"
    assert slow.engine.history == [], "expected its training to be stopped"
    for agent in agents:
        expect_means_of(federation, agent.theta(run_id), fast, rounds=2)


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_agents_that_are_not_needed_leave_and_come_back(
    federation: Federation, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "FIRST_ROUND_SECONDS", 1.0)  # so that it is worth two seconds
    monkeypatch.setattr(pacing, "LEAST_AWAY_SECONDS", 1.0)
    agents = await federation.enrol_all((30, 50, 100, 70, 20))
    for agent in agents:
        agent.engine.may_finish.clear()  # the round stays open
        agent.start()
    await federation.connected(agents)
    run_id = start(federation, kind, "reserve = 0.0")
    await until("invitations", lambda: phase_of(federation, run_id) is Phase.TRAINING)
    chosen = invited(federation, run_id)
    others = [agent for agent in agents if agent.name not in chosen]
    assert len(others) == 2
    for agent in others:
        await until("it to leave", lambda agent=agent: not is_connected(federation, agent))
        status = read_status(agent.home)
        assert status is not None
        assert status.link in (Link.AWAY, Link.CONNECTED)  # written after the stream's end
    for agent in others:
        await until("it to come back", lambda agent=agent: is_connected(federation, agent))
    for agent in agents:
        agent.engine.may_finish.set()
    members = [agent for agent in agents if agent.name in chosen]
    for agent in members:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    expect_means_of(federation, members[0].theta(run_id), members)
    assert all(agent.engine.begun == 0 for agent in others)


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_agents_take_turns_under_a_cap(federation: Federation, kind: str) -> None:
    """Whoever has the keys of the rounds before gives them on, though it has had its turn."""
    agents = await federation.enrol_all((30, 50, 100, 70, 20, 60))
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    run_id = start(federation, kind, "most_rounds = 1\nwindow = 2", rounds=3)
    record = await federation.run_over(run_id)
    assert record.phase is Phase.COMPLETED
    trained = sorted(agent.engine.begun for agent in agents)
    assert trained == [1, 1, 1, 2, 2, 2], "the first three again in the third round"


async def test_without_pacing_everybody_stays(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "LEAST_AWAY_SECONDS", 0.0)
    agents = await federation.enrol_all((30, 50, 100, 70))
    for agent in agents:
        agent.engine.may_finish.clear()
        agent.start()
    await federation.connected(agents)
    before = {agent.name: federation.conductor._sessions.get(agent.name) for agent in agents}  # type: ignore[union-attr]
    run_id = start(federation, "plain", 'reserve = 0.0\npacing = "none"')
    await until("invitations", lambda: phase_of(federation, run_id) is Phase.TRAINING)
    for agent in agents:
        agent.engine.may_finish.set()
    await federation.run_over(run_id)
    for agent in agents:
        assert federation.conductor._sessions.get(agent.name) is before[agent.name]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_an_agent_whose_hours_end_declines_and_comes_back(
    federation: Federation, kind: str
) -> None:
    agents = await federation.enrol_all((30, 50, 100, 70))
    *others, leaver = agents
    hours = Hours()
    leaver.availability = hours
    for agent in agents:
        agent.engine.may_finish.clear()
        agent.start()
    await federation.connected(agents)
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(kind=kind, selection="", rounds=1).replace("size = 3", "size = 4"))
    run_id = bytes.fromhex(command("run", "start", file, "--home", federation.home))
    await until("its training", leaver.engine.training.is_set)
    hours.close(True)
    await until("it to leave", lambda: not is_connected(federation, leaver))
    for agent in others:
        agent.engine.may_finish.set()
    await federation.run_over(run_id)  # without a deadline: it was not waited for
    status = read_status(leaver.home)
    assert status is not None
    assert (status.link, status.link_cause) == (Link.AWAY, "closed by the test")
    hours.close(False)
    assert (await leaver.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert leaver.engine.history == []
    expect_means_of(federation, leaver.theta(run_id), others)


async def test_an_agent_outside_its_hours_takes_no_part(federation: Federation) -> None:
    agents = await federation.enrol_all((30, 50, 100, 70))
    *others, absent = agents
    opens = datetime.now() + timedelta(hours=6)
    start_minute = opens.hour * 60 + opens.minute
    window = Window(frozenset(range(7)), start_minute, (start_minute + 59) % 1440 + 1)
    absent.availability = Availability((window,))
    for agent in agents:
        agent.start()
    run_id = start(federation, "plain", "over_selection = 2.0", rounds=2)
    for agent in others:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    await federation.run_over(run_id)
    assert not is_connected(federation, absent)
    assert absent.engine.begun == 0
    status = read_status(absent.home)
    assert status is not None
    assert status.link == Link.AWAY


async def test_an_agent_without_time_for_a_round_is_not_invited(federation: Federation) -> None:
    *agents, hurried = await federation.enrol_all((30, 50, 100, 70))
    async with raw_channel(hurried.identity) as channel:
        control = RawControl(channel)
        await control.hello(hurried.identity, availability={"seconds_left": 60})
        await federation.connected([hurried])
        selection = 'rule = "available"\nround_seconds = 600.0\nover_selection = 2.0'
        run_id = start(federation, "plain", selection)
        for agent in agents:
            agent.engine.may_finish.clear()
            agent.start()
        await until("invitations", lambda: phase_of(federation, run_id) is Phase.TRAINING)
        assert invited(federation, run_id) == {agent.name for agent in agents}
        for agent in agents:
            agent.engine.may_finish.set()
        await federation.run_over(run_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"capability": {"memory_bytes": 1 << 50}},
        {"capability": {"samples_per_second": -1.0}},
        {"capability": {"samples_per_second": float("nan")}},
        {"capability": {"training_seconds": float("inf")}},
        {"capability": {"processors": 65_536}},
        {"capability": {"engines": ["onnx"] * 9}},
        {"capability": {"engines": ["Onnx\n"]}},
        {"availability": {"seconds_left": 0}},
        {"availability": {"seconds_left": 31 * 86_400 + 1}},
    ],
    ids=str,
)
async def test_what_a_hello_says_has_limits(federation: Federation, fields: Any) -> None:
    agent = await federation.enrol("liar")
    async with raw_channel(agent.identity) as channel, refused(Reason.MALFORMED, "expected"):
        control = RawControl(channel)
        hello = control_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            protections=[control_pb2.PROTECTION_PLAIN],
            exchange_key=agent.identity.advertised_exchange_key(),
            **fields,
        )
        await control.send(hello=hello)
        await control.ended()
