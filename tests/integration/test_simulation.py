"""A simulated run and a real one, of the same seeds, names and data: the same bits."""

import shutil
import threading

import numpy as np
import pytest

from coordinator.config import load_run_config
from coordinator.run_state import Phase
from edge_agent.examples import read_examples
from edge_agent.local_rules import remembered
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import Theta, read_adapter
from fedloom.errors import ConfigError
from fedloom.plans import ADAPTER_FILE, PlanOrigin, Role, TrainableTensor
from fedloom.strategies import algorithm
from fedloom.strategies.portions import keeps_own_model, own_model
from simulation.conduct import Progress, conduct_round
from simulation.memories import Memories
from simulation.models import PlanModel
from simulation.movers import Alone
from simulation.records import Records
from simulation.runs import Simulation
from simulation.sums import Federation as Simulated
from tests.edge_agent import toy
from tests.integration.federation import Federation, command

ROUNDS = 3


RUN = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = {{agents}}
size = 10
population = {{population}}
[training]
learning_rate = 0.01
{{training}}
[protection]
kind = "{{kind}}"
clip = 0.25
[aggregation]
{{aggregation}}
"""
LAYOUT = (
    TrainableTensor("lora_A", (1, 32), 0, Role.LORA_A),
    TrainableTensor("lora_B", (32, 2), 32, Role.LORA_B),
    TrainableTensor("classifier", (3,), 96, Role.HEAD),
)
PAIR = (
    TrainableTensor("lora_A", (1, 32), 0, Role.LORA_A),
    TrainableTensor("lora_B", (64, 1), 32, Role.LORA_B),
    TrainableTensor("classifier", (3,), 96, Role.HEAD),
)
SCAFFOLD = 'strategy = "scaffold"\noptimizer = "sgd"\nweighting = "uniform"\nmax_steps = 4'
PARTS = [
    ("plain", 'lora = "ffa"'),
    ("plain", 'lora = "flexlora"'),
    ("sealed", 'lora = "rolora"'),
    ("sealed", 'lora = "fedsa"'),
    ("plain", f'lora = "fedsa"\n{SCAFFOLD}'),
    ("plain", 'personal = "fedper"'),
    ("sealed", 'personal = "fedrep"\nhead_steps = 1\nlocal_steps = 4'),
    ("sealed", 'personal = "ditto"\npersonal_lambda = 0.5'),
    ("plain", f'personal = "ditto"\npersonal_lambda = 0.5\nlora = "ffa"\n{SCAFFOLD}'),
]
RULES = [
    'rule = "median"',
    'rule = "trimmed_mean"\ntrim = 0.34',
    'rule = "multi_krum"\nfaulty = 1',
    'rule = "geometric_median"',
    'rule = "norm_bound"\nbound = 0.05',
]


@pytest.mark.parametrize(("kind", "training"), PARTS)
async def test_parts_and_own_models_are_those_of_a_real_run(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str, training: str
) -> None:
    layout = PAIR if "flexlora" in training else LAYOUT
    monkeypatch.setattr("tests.edge_agent.toy.LAYOUT", layout)
    monkeypatch.setattr("tests.edge_agent.toy.PlanOrigin", lambda name: PlanOrigin(name, 1, 2.0))
    _, real, own = await both(federation, kind, training)
    for name, model in real.items():
        np.testing.assert_array_equal(own[name], model)
    if "personal" in training or "fedsa" in training:
        first, second, *_ = real.values()
        assert not np.array_equal(first, second)


async def test_a_plateau_ends_both_in_the_same_round(federation: Federation) -> None:
    folder = federation.folder
    shutil.rmtree(folder / "plan")
    made = toy.save_toy(folder / "plan")
    held_out = toy.write_rows(folder / "test.csv", toy.toy_rows(40, seed=9))
    examples = {}
    agents = await federation.enrol_all()
    for number, agent in enumerate(agents):
        rows = toy.toy_rows(20 + 15 * number, seed=number)
        source = toy.write_rows(folder / f"data-{number}.csv", rows)
        agent.engine = OnnxEngine(folder / "plan", made.plan, source, held_out, threads=1)
        agent.engine.may_finish = threading.Event()  # which the fixture sets at the end
        examples[agent.name], _ = read_examples(folder / "plan", made.plan, source)
    text = RUN.format(kind="plain", training="", agents=3, aggregation="", population=0)
    plateau = '[evaluation]\nreport = "mean"\npatience = 2\nmetric = "accuracy"'
    file = folder / "run.toml"
    file.write_text(text.replace(f"rounds = {ROUNDS}", "rounds = 15") + plateau)
    run_id = bytes.fromhex(command("run", "start", file, "--home", federation.home))
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    rounds = len(federation.store.rounds(run_id))
    assert 3 < rounds < 15

    config, model = load_run_config(file), PlanModel(folder / "plan")
    work = model.work(examples, read_examples(folder / "plan", made.plan, held_out)[0])
    samples = {name: len(held) for name, held in examples.items()}
    federated = Simulated(run_id, config, model.plan, samples)
    evaluate = work.make().evaluate
    simulation = Simulation(federated, model.theta, Records(None, {}), None, evaluate)
    crew = Alone(work.make())
    while not simulation.finished:
        simulation.next_round(crew)
    assert simulation.progress.server.rounds == rounds
    real = read_adapter(agents[0].model(run_id) / ADAPTER_FILE, toy.LAYOUT)
    np.testing.assert_array_equal(simulation.progress.server.theta, real)
    blind = Simulation(federated, model.theta, Records(None, {}), None, lambda theta: None)
    with pytest.raises(ConfigError, match="held-out rows"):
        _ = blind.finished


@pytest.mark.parametrize("rule", RULES)
async def test_robust_rules_are_those_of_a_real_run(federation: Federation, rule: str) -> None:
    agents = 5 if "krum" in rule else 3
    theta, real, _ = await both(federation, "plain", "", rule, agents)
    for model in real.values():
        np.testing.assert_array_equal(theta, model)


async def both(
    federation: Federation, kind: str, training: str, aggregation: str = "", count: int = 3
) -> tuple[Theta, dict[str, Theta], dict[str, Theta]]:
    """Conduct a run with agents, and simulate it.

    Return the simulated model, each agent's model, and each simulated client's.
    """
    plan_folder = federation.folder / "plan"
    shutil.rmtree(plan_folder)
    made = toy.save_toy(plan_folder)
    agents = await federation.enrol_all([1] * count)
    examples = {}
    for number, agent in enumerate(agents):
        rows = toy.toy_rows(20 + 15 * number, seed=number)
        source = toy.write_rows(federation.folder / f"data-{number}.csv", rows)
        agent.engine = OnnxEngine(plan_folder, made.plan, source, None, threads=1)
        agent.engine.may_finish = threading.Event()  # which the fixture sets at the end
        examples[agent.name], _ = read_examples(plan_folder, made.plan, source)
    file, population = federation.folder / "run.toml", 10 if "scaffold" in training else 0
    values = {"kind": kind, "training": training, "agents": count, "aggregation": aggregation}
    file.write_text(RUN.format(**values, population=population))
    run_id = bytes.fromhex(command("run", "start", file, "--home", federation.home))
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    assert federation.run(run_id).phase is Phase.COMPLETED
    layout = made.plan.layout
    real = {one.name: read_adapter(one.model(run_id) / ADAPTER_FILE, layout) for one in agents}

    config = load_run_config(file)
    model, terms = PlanModel(plan_folder), config.training
    samples = {name: len(held) for name, held in examples.items()}
    simulated = Simulated(run_id, config, model.plan, samples)
    crew = Alone(model.work(examples, None).make())
    progress = Progress(algorithm(terms, layout).init(model.theta))
    kept = remembered(terms), len(model.theta), keeps_own_model(terms)
    memories = Memories(federation.folder / "memories", *kept)
    for _ in range(ROUNDS):
        progress, _ = conduct_round(simulated, progress, crew, memories)
    theta = progress.server.theta
    assert not np.array_equal(theta, made.theta)
    own = {
        name: own_model(terms, layout, theta, memories.read(name, progress.last.round, theta))
        for name in samples
    }
    return theta, real, own


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
