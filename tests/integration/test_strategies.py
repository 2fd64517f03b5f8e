"""Whole runs of strategies that send more than a movement, or have devices remember."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coordinator.run_state import Phase
from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE
from fedloom.v1 import control_pb2
from tests.integration.federation import LAYOUT, PARAMETERS, Agent, Federation, command, until
from tests.strategies.oracles import Client, FedAvgM, FedDyn, FedNova, Scaffold

ROUNDS, STEPS, RATE = 3, 4, 0.01
# Within every clip of these runs; a level of `sealed` with 10 members is about 2^-4 / 1.6e6.
TOLERANCE = {"plain": 1e-6, "masked": 2e-6, "encrypted": 2e-6, "sealed": 2e-6}
RUN = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = 3
size = 3
{{cohort}}
[training]
learning_rate = {RATE}
{{training}}
[protection]
kind = "{{kind}}"
clip = 0.0625
{{protection}}
"""
SCAFFOLD = f'strategy = "scaffold"\noptimizer = "sgd"\nweighting = "uniform"\nlocal_steps = {STEPS}'


def start(
    federation: Federation, kind: str, training: str, cohort: str = "", more: str = ""
) -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(kind=kind, training=training, cohort=cohort, protection=more))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


async def completed(federation: Federation, run_id: bytes, agents: Sequence[Agent]) -> Theta:
    """Wait for the run's end; return the model that all agents have, to the bit."""
    for agent in agents:
        finished = await agent.finished()
        assert finished.outcome == control_pb2.RUN_OUTCOME_COMPLETED, finished.reason
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    models = {agent.theta(run_id).tobytes() for agent in agents}
    assert len(models) == 1
    return agents[0].theta(run_id)


def movements(agents: Sequence[Agent], number: int) -> list[Client]:
    """Return what the agents moved in a round."""
    return [
        Client(
            agent.engine.history[number].update.delta.astype(np.float64),
            agent.engine.samples,
            STEPS,
            RATE,
            index,
        )
        for index, agent in enumerate(agents)
    ]


def check_linear(agents: Sequence[Agent], number: int, oracle: Scaffold | FedDyn) -> None:
    """What each device was told to add in a round is the paper's."""
    for index, agent in enumerate(agents):
        linear = agent.engine.history[number].linear
        assert linear is not None
        np.testing.assert_allclose(linear, oracle.correction(index), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "masked", "encrypted", "sealed"])
async def test_scaffold_is_the_papers_under_every_protection(
    federation: Federation, kind: str
) -> None:
    agents = await federation.enrol_all()
    run_id = start(federation, kind, SCAFFOLD, "population = 3")
    for agent in agents:
        agent.start()
    theta = await completed(federation, run_id, agents)
    oracle = Scaffold(federation.initial_theta().astype(np.float64), 3, 1.0)
    for number in range(ROUNDS):
        check_linear(agents, number, oracle)
        oracle.round(movements(agents, number))
    np.testing.assert_allclose(theta, oracle.x, rtol=0, atol=TOLERANCE[kind])
    for agent in agents:
        assert not list((agent.home / "runs" / run_id.hex()).glob("memory*"))
    record = federation.store.rounds(run_id)[0]
    assert record.sum.size_bytes > 4 * 2 * PARAMETERS * 0.8  # both halves travel


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_feddyn_is_the_papers(federation: Federation, kind: str) -> None:
    training = 'strategy = "fed_dyn"\ndynamic_alpha = 0.5\nweighting = "uniform"\nlocal_steps = 2'
    agents = await federation.enrol_all()
    run_id = start(federation, kind, training, "population = 3")
    for agent in agents:
        agent.start()
    theta = await completed(federation, run_id, agents)
    oracle = FedDyn(federation.initial_theta().astype(np.float64), 3, 0.5)
    for number in range(ROUNDS):
        check_linear(agents, number, oracle)
        oracle.round(movements(agents, number))
    np.testing.assert_allclose(theta, oracle.theta, rtol=0, atol=2 * TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_fednova_goes_the_mean_number_of_steps(federation: Federation, kind: str) -> None:
    training = 'strategy = "fed_nova"\noptimizer = "sgd"\nmax_steps = 20\nbatch_size = 10'
    agents = await federation.enrol_all()
    run_id = start(federation, kind, training)
    for agent in agents:
        agent.start()
    theta = await completed(federation, run_id, agents)
    oracle = FedNova(federation.initial_theta().astype(np.float64))
    for number in range(ROUNDS):
        clients = movements(agents, number)
        for client in clients:
            client.steps = -(-client.samples // 10)
        oracle.round(clients)
    np.testing.assert_allclose(theta, oracle.x, rtol=0, atol=20 * TOLERANCE[kind])


async def test_a_coordinator_that_is_given_the_sums_ends_where_the_agents_do(
    federation: Federation, tmp_path: Path
) -> None:
    training = 'strategy = "fed_avg_m"\nserver_momentum = 0.5\nweighting = "compute"'
    agents = await federation.enrol_all()
    for agent in agents:
        agent.permitted_release = agent.permitted_release.COORDINATOR
    run_id = start(federation, "sealed", training, more='release = "coordinator"')
    for agent in agents:
        agent.start()
    theta = await completed(federation, run_id, agents)
    oracle = FedAvgM(federation.initial_theta().astype(np.float64), 0.5, 1.0)
    for number in range(ROUNDS):
        clients = movements(agents, number)
        for client in clients:
            client.samples = -(-client.samples // 16)  # steps weigh
        oracle.round(clients)
    np.testing.assert_allclose(theta, oracle.w, rtol=0, atol=2e-6)
    command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    assert np.array_equal(read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT), theta)


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_a_device_that_dies_in_every_round_remembers_as_if_it_had_not(
    federation: Federation, kind: str
) -> None:
    """It dies once its update may be in the sum; what it remembers must follow the sum's."""
    agents = await federation.enrol_all()
    victim = agents[1]
    run_id = start(federation, kind, SCAFFOLD, "population = 3")
    folder = victim.home / "runs" / run_id.hex()
    for agent in agents:
        agent.start()
    for _ in range(2):
        await until("an update on its way", (folder / "memory.proposed").exists)
        await victim.stop()
        victim.start()
        await until("the round in the state", lambda: not (folder / "memory.proposed").exists())
    theta = await completed(federation, run_id, agents)
    oracle = Scaffold(federation.initial_theta().astype(np.float64), 3, 1.0)
    trained = [distinct(agent) for agent in agents]
    for number in range(ROUNDS):
        for index, agent in enumerate(trained):
            linear = agent[number][1]
            np.testing.assert_allclose(linear, oracle.correction(index), rtol=1e-3, atol=1e-3)
        oracle.round(
            [Client(agent[number][0], 1, STEPS, RATE, i) for i, agent in enumerate(trained)]
        )
    np.testing.assert_allclose(theta, oracle.x, rtol=0, atol=TOLERANCE[kind])


def distinct(agent: Agent) -> list[tuple[Theta, Theta | None]]:
    """Return what an agent's rounds moved and added: a round that is trained anew once."""
    found: dict[bytes, tuple[Theta, Theta | None]] = {}
    for trained in agent.engine.history:
        found[trained.theta.tobytes()] = (trained.update.delta.astype(np.float64), trained.linear)
    return list(found.values())
