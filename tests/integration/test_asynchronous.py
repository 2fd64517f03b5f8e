"""Asynchronous runs over real sessions: nobody waits for a slow agent, whose update counts once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from coordinator.collection import Collection
from coordinator.store import RoundRecord
from edge_agent.status import read_status
from fedloom.adapters import Theta, read_adapter
from fedloom.errors import Reason, refused_from_details
from fedloom.plans import ADAPTER_FILE
from fedloom.v1 import control_pb2
from tests.integration.engines import KeepingEngine
from tests.integration.federation import LAYOUT, Agent, Federation, command, until
from tests.integration.raw import RawControl, raw_channel
from tests.integration.test_strategies import TOLERANCE, distinct

RUN = """
name = "toy"
plan = "plan"
rounds = {rounds}
[cohort]
minimum = {minimum}
size = 10
[training]
strategy = "{strategy}"
learning_rate = 0.01
[protection]
kind = "{kind}"
{release}
[asynchronous]
buffer = {buffer}
{more}
"""
PROTECTIONS = ["plain", "masked", "encrypted", "sealed"]
Part = tuple[Agent, Theta, float]  # whose update is in a sum, in float64, with its factor


async def begin(
    federation: Federation,
    agents: Sequence[Agent],
    kind: str,
    rounds: int,
    strategy: str = "fed_buff",
    **values: int | str,
) -> bytes:
    """Queue a run as an operator does, once all these agents are here to begin with it."""
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    file = federation.folder / "run.toml"
    terms = {"minimum": 3, "buffer": 3, "more": "", "release": ""} | values
    file.write_text(RUN.format(kind=kind, rounds=rounds, strategy=strategy, **terms))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


async def completed(federation: Federation, run_id: bytes, agents: Sequence[Agent]) -> Theta:
    """Wait for the run's end and return the model that all agents have."""
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert (await federation.run_over(run_id)).phase.value == "completed"
    theta = agents[0].theta(run_id)
    assert all(np.array_equal(agent.theta(run_id), theta) for agent in agents)
    return theta


async def begun(agents: Sequence[Agent], count: int) -> None:
    """Wait until these agents are in their trainings of this number."""
    await until(f"training {count}", lambda: all(a.engine.begun >= count for a in agents))


def completed_rounds(federation: Federation, run_id: bytes) -> int:
    """Return how long the run's history is."""
    return len(federation.store.rounds(run_id))


def moved(theta: Theta, parts: Sequence[Part]) -> Theta:
    """The oracle: FedBuff's step, in float64, with weights by samples."""
    weight = sum(agent.engine.samples for agent, _, _ in parts)
    step = np.sum([a.engine.samples * factor * delta for a, delta, factor in parts], axis=0)
    after: Theta = theta + step / weight
    return after


def delta(agent: Agent, number: int) -> Theta:
    """Return what an agent's training of this number moved, trained anew or not."""
    return distinct(agent)[number][0]


def status_of(agent: Agent) -> str:
    """Return what `fedloom-agent status` says of what a device does and why."""
    status = read_status(agent.home)
    return "" if status is None else f"{status.step}: {status.step_cause}"


def staleness(federation: Federation) -> tuple[float, float]:
    """Return how many updates were counted, and the sum of their staleness."""
    assert federation.conductor is not None
    registry = federation.conductor._facilities.metrics.registry
    name = "fedloom_update_staleness_rounds"
    found = [registry.get_sample_value(f"{name}_{end}") for end in ("count", "sum")]
    assert None not in found
    return found[0] or 0.0, found[1] or 0.0


@pytest.mark.parametrize("kind", PROTECTIONS)
async def test_a_slow_agent_holds_nobody_up_and_its_update_counts_by_its_age(
    federation: Federation, kind: str
) -> None:
    """Rounds 1 and 2 go on without d; in round 3 its update is ready and c's is not."""
    agents = await federation.enrol_all((30, 50, 100, 40))
    a, b, c, d = agents
    d.engine.pauses_at, c.engine.pauses_at = 1, 3
    run_id = await begin(federation, agents, kind, rounds=4)
    await begun([a, b, c], 3)
    assert d.engine.begun == 1
    assert completed_rounds(federation, run_id) == 2
    await until("d's status to say so", lambda: "2 rounds on" in status_of(d))
    d.engine.may_finish.set()
    theta = await completed(federation, run_id, agents)
    expected: Theta = federation.initial_theta().astype(np.float64)
    for number in (0, 1):
        expected = moved(expected, [(agent, delta(agent, number), 1.0) for agent in (a, b, c)])
    late = (d, delta(d, 0), 3**-0.5)
    expected = moved(expected, [(a, delta(a, 2), 1.0), (b, delta(b, 2), 1.0), late])
    fresh: list[Part] = [(a, delta(a, 3), 1.0), (b, delta(b, 3), 1.0), (d, delta(d, 1), 1.0)]
    expected = moved(expected, fresh)
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2 * TOLERANCE[kind])
    assert staleness(federation) == (12.0, 2.0)
    for agent in agents:
        assert not list((agent.home / "runs" / run_id.hex()).glob("held.*"))


async def test_fedasync_with_a_buffer_of_one_is_the_papers(federation: Federation) -> None:
    """x <- (1 - alpha_t) x + alpha_t x_new, for whoever is ready, whatever it began from."""
    a, b = await federation.enrol_all((30, 50))
    b.engine.pauses_at, a.engine.pauses_at = 1, 3
    run_id = await begin(
        federation, [a, b], "plain", 4, "fed_async", minimum=1, buffer=1, more="mixing = 0.5"
    )
    await begun([a], 3)
    b.engine.may_finish.set()
    theta = await completed(federation, run_id, [a, b])
    x_0: Theta = federation.initial_theta().astype(np.float64)
    x = x_0
    for number in (0, 1):
        x = 0.5 * x + 0.5 * (x + delta(a, number))
    alpha = 0.5 * 3**-0.5
    x = (1 - alpha) * x + alpha * (x_0 + delta(b, 0))
    x = 0.5 * x + 0.5 * (x + delta(b, 1))
    np.testing.assert_allclose(theta, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", PROTECTIONS)
async def test_an_update_that_gets_too_old_is_given_up_and_made_anew(
    federation: Federation, kind: str
) -> None:
    agents = await federation.enrol_all((30, 50, 100, 40))
    a, b, c, d = agents
    d.engine.pauses_at, c.engine.pauses_at = 1, 3
    run_id = await begin(federation, agents, kind, rounds=3, more="max_staleness = 1")
    await begun([d], 2)  # it was told of round 3, whose sum would be two rounds newer
    d.engine.may_finish.set()
    theta = await completed(federation, run_id, agents)
    [trained] = d.engine.history
    expected: Theta = federation.initial_theta().astype(np.float64)
    for number in (0, 1):
        expected = moved(expected, [(agent, delta(agent, number), 1.0) for agent in (a, b, c)])
    np.testing.assert_allclose(trained.theta, expected, rtol=0, atol=2 * TOLERANCE[kind])
    expected = moved(
        expected, [(a, delta(a, 2), 1.0), (b, delta(b, 2), 1.0), (d, delta(d, 0), 1.0)]
    )
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2 * TOLERANCE[kind])


async def test_the_coordinator_refuses_what_is_too_old_and_asks_again(
    federation: Federation,
) -> None:
    a, rogue = await federation.enrol_all((30, 50))
    a.engine.pauses_at = 2
    more = "max_staleness = 0"
    run_id = await begin(federation, [a], "plain", 5, minimum=1, buffer=1, more=more)
    await begun([a], 2)
    async with raw_channel(rogue.identity) as channel:
        control = RawControl(channel)
        await control.hello(rogue.identity)
        invitation = (await control.receive("invitation")).invitation
        assert invitation.round == 2
        await control.send(ready=control_pb2.Ready(run_id=run_id, round=1, base_rounds=0))
        # Of a round that went on: no answer, the newest invitation is what it may answer.
        await control.send(ready=control_pb2.Ready(run_id=run_id, round=2, base_rounds=0))
        refusal = refused_from_details((await control.receive("refusal")).refusal.details)
        assert refusal.reason is Reason.DEADLINE_PASSED
        assert (await control.receive("invitation")).invitation.round == 2
        await control.send(ready=control_pb2.Ready(run_id=run_id, round=2, base_rounds=1))
        assert (await control.receive("cohort")).cohort.members == [rogue.name]


@pytest.mark.parametrize("kind", ["plain", "sealed"])
@pytest.mark.parametrize("victim", ["agent", "coordinator", "both"])
async def test_a_training_outlives_processes_and_is_counted_by_its_age(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str, victim: str
) -> None:
    """d dies halfway in its training, the run goes on, d too: from the state that it had."""
    monkeypatch.setattr("edge_agent.checkpoints.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("edge_agent.checkpoints.PAUSE_PER_SAVE", 0.0)
    agents = await federation.enrol_all((30, 50, 100, 40))
    a, b, c, d = agents
    engine = d.engine = KeepingEngine(40)
    engine.may_finish.clear()
    c.engine.pauses_at = 3
    run_id = await begin(federation, agents, kind, rounds=3)
    await until("half of d's training", engine.training.is_set)
    await begun([a, b, c], 3)
    if victim != "coordinator":
        await d.stop()
    if victim != "agent":
        await federation.stop()
        await federation.start()
    engine.may_finish.set()
    if victim != "coordinator":
        d.start()
    theta = await completed(federation, run_id, agents)
    assert engine.steps_made == engine.steps  # none of them twice
    expected: Theta = federation.initial_theta().astype(np.float64)
    for number in (0, 1):
        expected = moved(expected, [(agent, delta(agent, number), 1.0) for agent in (a, b, c)])
    late = (d, delta(d, 0), 3**-0.5)
    np.testing.assert_array_equal(engine.history[0].theta, federation.initial_theta())
    expected = moved(expected, [(a, delta(a, 2), 1.0), (b, delta(b, 2), 1.0), late])
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2 * TOLERANCE[kind])


@pytest.mark.parametrize("kind", PROTECTIONS)
async def test_a_device_that_dies_with_an_update_on_its_way_has_it_counted_once(
    federation: Federation, kind: str
) -> None:
    """Whether or not the sum has it by then."""
    agents = await federation.enrol_all()
    victim = agents[1]
    run_id = await begin(federation, agents, kind, rounds=5)
    place = victim.home / "runs" / run_id.hex() / "held.place"
    for _ in range(2):
        await until("an update on its way", place.exists)
        await victim.stop()
        victim.start()
        await until("the round in the state", lambda: not place.exists())
    theta = await completed(federation, run_id, agents)
    expected: Theta = federation.initial_theta().astype(np.float64)
    for number in range(5):
        expected = moved(expected, [(agent, delta(agent, number), 1.0) for agent in agents])
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2 * TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["encrypted", "sealed"])
async def test_a_newcomer_is_given_the_keys_by_an_agent_that_trains(
    federation: Federation, kind: str
) -> None:
    """a, whom the keys are asked of, trains all the time; in round 3 the newcomer is needed."""
    agents = await federation.enrol_all((30, 50, 100, 40))
    a, b, c, d = agents
    a.engine.pauses_at, b.engine.pauses_at, c.engine.pauses_at = 1, 2, 3
    run_id = await begin(federation, agents, kind, rounds=3)
    await begun([b, c, d], 2)
    newcomer = await federation.enrol("newcomer", 60)
    newcomer.start()
    await federation.connected([newcomer])
    b.engine.may_finish.set()
    theta = await completed(federation, run_id, [*agents, newcomer])
    expected: Theta = federation.initial_theta().astype(np.float64)
    for number in (0, 1):
        expected = moved(expected, [(agent, delta(agent, number), 1.0) for agent in (b, c, d)])
    members = (b, delta(b, 2), 1.0), (d, delta(d, 2), 1.0), (newcomer, delta(newcomer, 0), 1.0)
    np.testing.assert_allclose(theta, moved(expected, members), rtol=0, atol=2 * TOLERANCE[kind])
    assert a.engine.begun == 1


async def test_a_coordinator_is_given_the_sums_while_others_train(federation: Federation) -> None:
    agents = await federation.enrol_all((30, 50, 100, 40))
    for agent in agents:
        agent.permitted_release = agent.permitted_release.COORDINATOR
    agents[3].engine.pauses_at = 1
    release = 'release = "coordinator"'
    run_id = await begin(federation, agents, "sealed", 3, release=release)
    theta = await completed(federation, run_id, agents)
    command("run", "export", "--out", federation.folder / "model", "--home", federation.home)
    assert np.array_equal(read_adapter(federation.folder / "model" / ADAPTER_FILE, LAYOUT), theta)


@pytest.mark.parametrize(("kind", "trainings"), [("plain", 1), ("masked", 2), ("sealed", 2)])
async def test_an_update_that_was_vouched_for_is_never_in_another_sum(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str, trainings: int
) -> None:
    """The first sum cannot be stored; under masks somebody may have opened it all the same."""
    stored, failed = Collection.stored, []

    async def fails_once(*arguments: Any) -> RoundRecord | None:
        record = await stored(*arguments)
        if failed:
            return record
        failed.append(True)
        return None

    monkeypatch.setattr(Collection, "stored", fails_once)
    agents = await federation.enrol_all()
    run_id = await begin(federation, agents, kind, rounds=1)
    theta = await completed(federation, run_id, agents)
    assert [agent.engine.begun for agent in agents] == [trainings] * 3
    [record] = federation.store.rounds(run_id)
    assert record.round == trainings
    parts = [(agent, delta(agent, 0), 1.0) for agent in agents]  # of the last training
    expected = moved(federation.initial_theta().astype(np.float64), parts)
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2 * TOLERANCE[kind])
