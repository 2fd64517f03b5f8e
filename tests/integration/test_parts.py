"""Whole runs whose updates hold parts of the model, and whose devices keep parts of their own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coordinator.run_state import Phase
from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE, Role, TrainableTensor
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation, command, until

ROUNDS = 3
LAYOUT = (
    TrainableTensor("lora_A", (2, 1000), 0, Role.LORA_A),
    TrainableTensor("lora_B", (1400, 2), 2000, Role.LORA_B),
    TrainableTensor("classifier", (200,), 4800, Role.HEAD),
)
A, B, HEAD = slice(0, 2000), slice(2000, 4800), slice(4800, 5000)
PLAIN_HEADER = 60
RUN = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = 3
size = 3
[training]
weighting = "uniform"
local_steps = 4
{{training}}
[protection]
kind = "{{kind}}"
clip = 0.0625
{{protection}}
"""


@pytest.fixture(autouse=True)
def adapter_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the toy plan the roles of an adapter with a head."""
    monkeypatch.setattr("tests.integration.federation.LAYOUT", LAYOUT)


def start(federation: Federation, kind: str, training: str, protection: str = "") -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(kind=kind, training=training, protection=protection))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


async def completed(federation: Federation, run_id: bytes, agents: Sequence[Agent]) -> list[Theta]:
    """Wait for the run's end; return each agent's model."""
    for agent in agents:
        finished = await agent.finished()
        assert finished.outcome == control_pb2.RUN_OUTCOME_COMPLETED, finished.reason
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    return [agent.theta(run_id) for agent in agents]


def moved(agent: Agent) -> list[Theta]:
    """Return what an agent's trainings moved: one that was done anew counts once."""
    found = {trained.theta.tobytes(): trained.update.delta for trained in agent.engine.history}
    return [delta.astype(np.float64) for delta in found.values()]


@pytest.mark.parametrize("kind", ["plain", "masked", "sealed"])
async def test_rolora_sends_a_factor_at_a_time(
    federation: Federation, tmp_path: Path, kind: str
) -> None:
    agents = await federation.enrol_all()
    release = 'release = "coordinator"' if kind == "sealed" else ""
    for agent in agents:
        agent.permitted_release = agent.permitted_release.COORDINATOR
    run_id = start(federation, kind, 'lora = "rolora"', release)
    for agent in agents:
        agent.start()
    models = await completed(federation, run_id, agents)
    expected = federation.initial_theta().astype(np.float64)
    for number, mean in enumerate(np.mean([moved(agent) for agent in agents], axis=0)):
        for part in ((B, HEAD), (A, HEAD))[number % 2]:
            expected[part] += mean[part]
    for model in models:
        assert np.array_equal(model, models[0])
        np.testing.assert_allclose(model, expected, rtol=0, atol=1e-6)
    if kind == "plain":
        sizes = [record.sum.size_bytes - PLAIN_HEADER for record in federation.store.rounds(run_id)]
        assert sizes == [4 * 3000, 4 * 2200, 4 * 3000]
    command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    assert np.array_equal(read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT), models[0])


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_a_device_that_dies_keeps_its_own_part_with_the_rounds(
    federation: Federation, kind: str
) -> None:
    """FedSA-LoRA: B is a device's own and moves with the sums that its A is in."""
    agents = await federation.enrol_all()
    victim = agents[1]
    run_id = start(federation, kind, 'lora = "fedsa"')
    folder = victim.home / "runs" / run_id.hex()
    for agent in agents:
        agent.start()
    for _ in range(2):
        await until("an update on its way", (folder / "memory.proposed").exists)
        await victim.stop()
        victim.start()
        await until("the round in the state", lambda: not (folder / "memory.proposed").exists())
    models = await completed(federation, run_id, agents)
    initial = federation.initial_theta().astype(np.float64)
    deltas = [moved(agent) for agent in agents]
    mean = np.mean(deltas, axis=0).sum(axis=0)
    for model, own in zip(models, deltas, strict=True):
        assert len(own) == ROUNDS
        for part in (A, HEAD):
            assert np.array_equal(model[part], models[0][part])
            np.testing.assert_allclose(model[part], (initial + mean)[part], rtol=0, atol=2e-6)
        np.testing.assert_allclose(model[B], (initial + sum(own))[B], rtol=0, atol=1e-6)
    assert not np.array_equal(models[0][B], models[1][B])
    assert not list(folder.glob("memory*"))


async def test_ditto_and_fine_tuning_end_with_a_model_of_ones_own(federation: Federation) -> None:
    training = 'personal = "ditto"\npersonal_lambda = 0.5\nfine_tune_steps = 2\nlora = "ffa"'
    agents = await federation.enrol_all()
    run_id = start(federation, "sealed", training)
    for agent in agents:
        agent.start()
    models = await completed(federation, run_id, agents)
    initial = federation.initial_theta()
    for agent, model in zip(agents, models, strict=True):
        # Per round an update and a step of one's own; then the fine-tuning, from one's own model.
        assert len(agent.engine.history) == 2 * ROUNDS + 1
        own, last = agent.engine.history[1::2], agent.engine.history[-1]
        expected = initial.copy()
        for trained in own:
            assert trained.linear is not None
            np.testing.assert_array_equal(trained.theta, expected)
            expected = expected + trained.update.delta
        np.testing.assert_array_equal(last.theta, expected)
        np.testing.assert_array_equal(model, expected + last.update.delta)
        shared = agent.engine.history[2].theta  # the global model after a round
        np.testing.assert_array_equal(shared[A], initial[A])
        drawn = np.float32(0.5) * (own[1].theta - shared)
        np.testing.assert_array_equal(own[1].linear, drawn)
        assert not (agent.home / "runs" / run_id.hex() / "own" / "training.checkpoint").exists()


async def test_a_device_evaluates_the_model_that_it_will_use(federation: Federation) -> None:
    agents = await federation.enrol_all()
    seen: dict[str, list[Theta]] = {agent.name: [] for agent in agents}
    for agent in agents:
        evaluate = agent.engine.evaluate
        agent.engine.evaluate = (  # type: ignore[method-assign]
            lambda theta, name=agent.name, call=evaluate: (seen[name].append(theta), call(theta))[1]
        )
    run_id = start(federation, "plain", 'personal = "fedper"')
    for agent in agents:
        agent.start()
    models = await completed(federation, run_id, agents)
    for agent, model in zip(agents, models, strict=True):
        assert np.array_equal(seen[agent.name][-1], model)
        own = federation.initial_theta() + sum(moved(agent))
        np.testing.assert_allclose(model[HEAD], own[HEAD], rtol=0, atol=1e-6)


async def test_another_run_waits_for_a_device_that_fine_tunes(federation: Federation) -> None:
    agents = await federation.enrol_all()
    agents[0].engine.pauses_at = ROUNDS + 1
    run_id = start(federation, "plain", "fine_tune_steps = 2")
    for agent in agents:
        agent.start()
    await until("fine-tuning", lambda: agents[0].engine.begun == ROUNDS + 1)
    second = start(federation, "plain", "")
    await until("the next run", lambda: agents[1].engine.begun == ROUNDS + 2)
    agents[0].engine.may_finish.set()
    tuned = await completed(federation, run_id, agents)
    for agent, model in zip(agents, tuned, strict=True):
        last = agent.engine.history[ROUNDS]
        np.testing.assert_array_equal(model, last.theta + last.update.delta)
    await completed(federation, second, agents)
