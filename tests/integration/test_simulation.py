"""A simulated run and a real one, of the same seeds, names and data: the same bits."""

import shutil
import threading

import numpy as np
import pytest

from coordinator.config import load_run_config
from coordinator.run_state import Phase
from edge_agent.examples import read_examples
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE
from fedloom.strategies import algorithm
from simulation.conduct import Progress, conduct_round
from simulation.memories import Memories
from simulation.models import PlanModel
from simulation.movers import Alone
from simulation.sums import Federation as Simulated
from tests.edge_agent import toy
from tests.integration.federation import Federation

ROUNDS = 3


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_simulated_and_real_rounds_end_with_equal_bits(
    federation: Federation, kind: str
) -> None:
    plan_folder = federation.folder / "plan"
    shutil.rmtree(plan_folder)
    made = toy.save_toy(plan_folder)
    agents = await federation.enrol_all()
    examples = {}
    for number, agent in enumerate(agents):
        rows = toy.toy_rows(20 + 15 * number, seed=number)
        source = toy.write_rows(federation.folder / f"data-{number}.csv", rows)
        agent.engine = OnnxEngine(plan_folder, made.plan, source, None, threads=1)
        agent.engine.may_finish = threading.Event()  # which the fixture sets at the end
        examples[agent.name], _ = read_examples(plan_folder, made.plan, source)
    run_id = federation.start_run(kind, ROUNDS)
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    assert federation.run(run_id).phase is Phase.COMPLETED
    model_file = agents[0].model(run_id) / ADAPTER_FILE
    real = read_adapter(model_file, toy.LAYOUT)

    config = load_run_config(federation.folder / "run.toml")
    model = PlanModel(plan_folder)
    simulated = Simulated(
        run_id, config, model.plan, {name: len(held) for name, held in examples.items()}
    )
    crew = Alone(model.work(examples, None).make())
    progress = Progress(algorithm(config.training).init(model.theta))
    for _ in range(ROUNDS):
        progress, report = conduct_round(
            simulated, progress, crew, Memories(federation.folder, 0, 0)
        )
        assert report.clients == len(agents)
    assert not np.array_equal(real, made.theta)
    np.testing.assert_array_equal(progress.server.theta, real)
