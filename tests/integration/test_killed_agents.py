"""Agents that die while they train: what they have learnt is there when they come back."""

import asyncio
import hashlib
import json
import random
import shutil
import signal
import struct
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config import parse_run_config
from coordinator.run_state import Phase
from edge_agent.config import AgentConfig, write_agent_config
from edge_agent.data import DataSource
from edge_agent.engine import LocalUpdate
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.participation import Participation
from edge_agent.protection import UpdateProtection
from fedloom.adapters import Theta, read_adapter
from fedloom.errors import Reason, Refused
from fedloom.plans import ADAPTER_FILE
from fedloom.terms import LocalTraining, Protection
from fedloom.v1 import control_pb2
from tests.edge_agent.toy import Toy, Unkept, save_toy, toy_rows, write_rows
from tests.integration.engines import FakeEngine, KeepingEngine
from tests.integration.federation import Agent, Federation, command, until
from tests.integration.processes import process

KINDS = ["plain", "masked", "encrypted", "sealed"]
ROUNDS, ROWS, BATCH_SIZE = 2, 200, 4
PLACE = struct.Struct("<24xQ48xQ")  # round and steps done, in a checkpoint's header


def checkpoints(agent: Agent) -> list[Path]:
    """Return everything that trainings have left on the device."""
    return list((agent.home / "runs").glob("*/training.checkpoint*"))


# processes


@pytest.mark.timeout(3600)
async def test_an_agent_killed_at_random_ends_with_the_bits_of_one_that_was_not(
    federation: Federation, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills: int = request.config.getoption("kills")
    toy, data = toy_plan(federation), write_rows(tmp_path / "train.csv", toy_rows(ROWS, seed=3))
    agent = await federation.enrol("mayfly")
    config = AgentConfig(data, minimum_protection=Protection.PLAIN, threads=1)
    write_agent_config(agent.home, config)
    run_id, terms = start_long_run(federation, kills)
    steps = ROUNDS * terms.epochs * ROWS // BATCH_SIZE

    chance = random.Random(20)  # noqa: S311 - repeats itself
    places = sorted(chance.uniform(0, 0.7) * steps for _ in range(kills))
    logs = [tmp_path / f"life-{number}.log" for number in range(kills + 1)]
    for number, place in enumerate(places):
        async with slow_agent(agent, logs[number]) as running:
            if number % 3:  # the others die at whatever they are about in their first second
                reached = lambda: steps_kept(agent, run_id, terms) >= place  # noqa: B023, E731
                await until("the place to die", reached)
            await asyncio.sleep(chance.uniform(0, 0.05 if number % 3 else 1.0))
            running.kill()
            assert await running.wait() == -signal.SIGKILL, "it was over before it was killed"
    async with slow_agent(agent, logs[-1]) as running:
        assert await running.wait() == 0, logs[-1].read_text()

    updates, theta = undisturbed(toy, data, agent, run_id, terms)
    loss = federation.store.reports(run_id)[-1]["training_loss"]
    kept = (agent.home / "runs" / run_id.hex() / "update.bin").read_bytes()
    delta = updates[-1].delta
    assert sha256(kept[-delta.nbytes :]) == sha256(delta.tobytes())
    assert loss == np.float32(updates[-1].mean_loss)
    model = agent.model(run_id) / ADAPTER_FILE
    assert read_adapter(model, toy.plan.layout).tobytes() == theta.tobytes()
    assert sum("training resumed" in events(log) for log in logs) >= kills // 3
    assert checkpoints(agent) == []


def toy_plan(federation: Federation) -> Toy:
    """Put a plan that can be trained in the place of the federation's."""
    folder = federation.folder / "plan"
    shutil.rmtree(folder)
    return save_toy(folder)


def start_long_run(federation: Federation, kills: int) -> tuple[bytes, LocalTraining]:
    """Start a run with some steps for each kill, and some seconds of them after the last."""
    epochs = max(20, kills)
    file = federation.folder / "run.toml"
    file.write_text(
        f'name = "toy"\nplan = "plan"\nrounds = {ROUNDS}\n[cohort]\nminimum = 1\nsize = 1\n'
        f"[training]\nbatch_size = {BATCH_SIZE}\nepochs = {epochs}\n"
        '[protection]\nkind = "plain"\n'
    )
    run_id = bytes.fromhex(command("run", "start", file, "--home", federation.home))
    return run_id, parse_run_config(tomllib.loads(file.read_text()), file).training


def steps_kept(agent: Agent, run_id: bytes, terms: LocalTraining) -> int:
    """Return how many steps of the run a process that is started now need not make."""
    try:
        with (agent.home / "runs" / run_id.hex() / "training.checkpoint").open("rb") as file:
            number, step = PLACE.unpack(file.read(PLACE.size))
    except OSError:
        return 0
    return int((number - 1) * terms.epochs * ROWS // BATCH_SIZE + step)


def slow_agent(agent: Agent, log: Path) -> Any:
    """Run the product's agent, slowly."""
    arguments = ("--home", agent.home, "--json", "run", "--once")
    return process(log, "-m", "tests.integration.slow_agent", *arguments)


def events(log: Path) -> list[str]:
    """Return what a process has logged."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["event"] for line in lines if line.endswith("}")]


def undisturbed(
    toy: Toy, data: DataSource, agent: Agent, run_id: bytes, terms: LocalTraining
) -> tuple[list[LocalUpdate], Theta]:
    """Train the rounds without a coordinator, a file or a kill."""
    engine = OnnxEngine(toy.folder, toy.plan, data, None, threads=1)
    theta, updates = toy.theta, []
    for number in range(1, ROUNDS + 1):
        text = f"{terms.seed}/{run_id.hex()}/{number}/{agent.name}"
        order_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        updates.append(engine.train(theta, terms, order_seed, lambda _: None, Unkept()))
        theta = theta + updates[-1].delta
    return updates, theta


def sha256(content: bytes) -> str:
    """Return the digest in hex."""
    return hashlib.sha256(content).hexdigest()


# restarts at chosen moments


async def keeping(federation: Federation) -> tuple[list[Agent], KeepingEngine]:
    """Enrol three agents, the second of which keeps its steps."""
    agents = await federation.enrol_all()
    engine = KeepingEngine(50)
    agents[1].engine = engine
    return agents, engine


async def complete(federation: Federation, run_id: bytes, agents: list[Agent]) -> None:
    """Wait for the run's end; everybody's update was in it, and no state of a training is left."""
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
        assert np.array_equal(agent.theta(run_id), agents[0].theta(run_id))
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    [record] = federation.store.rounds(run_id)
    assert (len(record.slots), record.attempt) == (3, 1)
    assert [checkpoints(agent) for agent in agents] == [[]] * 3


@pytest.mark.parametrize("kind", KINDS)
async def test_an_agent_that_restarts_while_it_trains_makes_no_step_twice(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("edge_agent.checkpoints.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("edge_agent.checkpoints.PAUSE_PER_SAVE", 0.0)
    agents, engine = await keeping(federation)
    engine.may_finish.clear()
    run_id = federation.start_run(kind, rounds=1)
    for agent in agents:
        agent.start()
    await until("half a training", engine.training.is_set)
    await agents[1].stop()
    assert "training.checkpoint" in [path.name for path in checkpoints(agents[1])]
    engine.may_finish.set()
    agents[1].start()
    await complete(federation, run_id, agents)
    assert engine.steps_made == engine.steps


@pytest.mark.parametrize("kind", KINDS)
async def test_an_agent_that_restarts_before_its_upload_does_not_train_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    agents, engine = await keeping(federation)
    encoding, stopped = asyncio.Event(), asyncio.Event()
    loop, write_update = asyncio.get_running_loop(), UpdateProtection.write_update

    def dying(self: UpdateProtection, *arguments: Any) -> Any:
        if agents[1].home in arguments[-1].parents and not stopped.is_set():
            loop.call_soon_threadsafe(encoding.set)
            asyncio.run_coroutine_threadsafe(stopped.wait(), loop).result()
            raise OSError("this process is dead")
        return write_update(self, *arguments)

    monkeypatch.setattr(UpdateProtection, "write_update", dying)
    run_id = federation.start_run(kind, rounds=1)
    for agent in agents:
        agent.start()
    await encoding.wait()
    await agents[1].stop()
    stopped.set()
    agents[1].start()
    await complete(federation, run_id, agents)
    assert engine.steps_made == engine.steps


# nothing stays


async def test_an_applied_result_leaves_nothing_of_the_training(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents, engine = await keeping(federation)
    left: list[list[Path]] = []
    evaluate = FakeEngine.evaluate

    def watched(self: FakeEngine, theta: Theta) -> Any:
        if self is engine:
            left.append(checkpoints(agents[1]))
        return evaluate(self, theta)

    monkeypatch.setattr(FakeEngine, "evaluate", watched)
    run_id = federation.start_run("plain", rounds=1)
    for agent in agents:
        agent.start()
    await complete(federation, run_id, agents)
    assert left == [[]]


async def test_a_failed_run_leaves_nothing_of_the_training(federation: Federation) -> None:
    agents, engine = await keeping(federation)
    agents[0].engine.refusal = Refused(Reason.DATA_EMPTY, "expected a row")
    run_id = federation.start_run("plain", rounds=1, gathering=0.5)
    for agent in agents:
        agent.start()
    finished = await agents[1].finished()
    assert finished.outcome == control_pb2.RUN_OUTCOME_FAILED
    assert engine.steps_made == engine.steps
    assert (await federation.run_over(run_id)).phase is Phase.FAILED
    assert checkpoints(agents[1]) == []


async def test_an_interrupted_training_leaves_nothing(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.checkpoints.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("edge_agent.checkpoints.PAUSE_PER_SAVE", 0.0)
    agents, engine = await keeping(federation)
    left: list[list[Path]] = []
    result = Participation.result

    async def watched(self: Participation, message: control_pb2.Result) -> None:
        if self._device.home == agents[1].home:
            left.append(checkpoints(agents[1]))
        await result(self, message)

    monkeypatch.setattr(Participation, "result", watched)
    engine.may_finish.clear()
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    run_id = federation.start_run("plain", rounds=1, minimum=2, training=1.5)
    await until("half a training", engine.training.is_set)
    assert checkpoints(agents[1])
    await federation.run_over(run_id)
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert left == [[]]
