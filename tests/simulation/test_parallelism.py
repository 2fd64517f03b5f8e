"""Who trains a client changes no bit of the model."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.engine import LocalUpdate
from fedloom.terms import LocalTraining, Optimizer, Strategy
from simulation.movers import Alone, Task, Trained
from simulation.processes import Processes, WorkerLost
from simulation.torch_mover import theta_of
from tests.simulation.samples import CLASSES, FEATURES, learning, network, rows, theta

TERMS = {
    Strategy.FED_PROX: {"proximal_mu": 0.1},
    Strategy.FED_NOVA: {"max_steps": 3},
    Strategy.SCAFFOLD: {"max_steps": 3, "weighting": "uniform"},
    Strategy.FED_DYN: {"weighting": "uniform"},
}


@pytest.mark.parametrize("strategy", [Strategy.FED_AVG, Strategy.FED_ADAM, *TERMS])
@pytest.mark.parametrize("vectorise", [False, True])
def test_any_number_of_workers_ends_with_equal_bits(strategy: Strategy, vectorise: bool) -> None:
    def trained(workers: int) -> np.ndarray:
        fl = learning(
            strategy=strategy.name.lower(),
            terms={"training": {"batch_size": 8, **TERMS.get(strategy, {})}},
            cohort_size=5,
            workers=workers,
            vectorise=vectorise,
        )
        fl.train(3)
        return theta(fl)

    alone = trained(1)
    for workers in (2, 3):
        np.testing.assert_array_equal(trained(workers), alone)


def adapter() -> torch.nn.Module:
    """Return a network whose middle layer has two factors, named as PEFT names them."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        OrderedDict(
            lora_A=torch.nn.Linear(FEATURES, 2, bias=False),
            lora_B=torch.nn.Linear(2, 16, bias=False),
            relu=torch.nn.ReLU(),
            classifier=torch.nn.Linear(16, CLASSES),
        )
    )


OWN = [
    {"lora": "ffa"},
    {"lora": "rolora"},
    {"lora": "fedsa"},
    {"personal": "fedper"},
    {"personal": "fedrep", "head_steps": 1, "local_steps": 3},
    {"personal": "ditto", "personal_lambda": 0.5},
    {"personal": "fedper", "lora": "rolora", "max_steps": 3, "weighting": "uniform"},
]


@pytest.mark.parametrize("rule", OWN, ids=str)
def test_parts_and_own_models_are_those_of_one_process_and_of_one_by_one(
    rule: dict[str, object], tmp_path: Path
) -> None:
    found = {}
    for vectorise, workers in ((False, 1), (False, 2), (True, 1), (True, 2)):
        fl = learning(
            model=adapter(),
            head="classifier",
            terms={"training": {"batch_size": 8, **rule}},
            strategy="scaffold" if "max_steps" in rule else "fed_avg",
            held_out=rows(64, seed=99),
            cohort_size=5,
            workers=workers,
            vectorise=vectorise,
            out=tmp_path / f"{vectorise}-{workers}",
        )
        history = fl.train(4)
        found[vectorise, workers] = theta(fl), history
    for vectorise in (False, True):
        np.testing.assert_array_equal(found[vectorise, 1][0], found[vectorise, 2][0])
        assert found[vectorise, 1][1] == found[vectorise, 2][1]
    np.testing.assert_allclose(found[False, 1][0], found[True, 1][0], atol=1e-6)
    head = theta_of(adapter())[-17 * CLASSES :]
    stays = rule.get("personal") in ("fedper", "fedrep")
    assert np.array_equal(found[False, 1][0][-17 * CLASSES :], head) == stays


def test_own_heads_learn_what_the_global_model_does_not(tmp_path: Path) -> None:
    """Accuracy is that of the clients' own models; the head of the global one never moves."""
    fl = learning(
        model=adapter(),
        head="classifier",
        terms={"training": {"batch_size": 8, "epochs": 4, "personal": "fedper"}},
        held_out=rows(200, seed=99),
    )
    last = fl.train(8)[-1].evaluation
    assert last is not None
    inputs, labels = rows(200, seed=99)
    with torch.inference_mode():
        shared = (
            fl.get_global_model()(torch.from_numpy(inputs)).argmax(1).numpy() == labels
        ).mean()
    assert last.count == 200 * 7
    assert last.correct / last.count > shared.mean() + 0.1


def test_a_client_with_too_few_steps_for_its_head_is_told_apart() -> None:
    """The first client has 9 rows, two batches: no step is left for the rest of its model."""
    for vectorise in (False, True):
        fl = learning(
            model=adapter(),
            head="classifier",
            terms={"training": {"batch_size": 8, "personal": "fedrep", "head_steps": 2}},
            vectorise=vectorise,
        )
        [first] = fl.train(1)
        assert (first.report.clients, first.report.failed) == (5, 2)


def test_dropout_follows_from_the_clients_seed_and_leaves_the_callers_alone() -> None:
    def trained(workers: int) -> np.ndarray:
        torch.manual_seed(workers)
        fl = learning(model=network(dropout=0.5), workers=workers, vectorise=False)
        before = torch.default_generator.get_state()
        fl.train(2)
        assert torch.equal(before, torch.default_generator.get_state())
        return theta(fl)

    np.testing.assert_array_equal(trained(1), trained(2))


def test_groups_differ_from_single_clients_by_rounding_only() -> None:
    single, grouped = learning(vectorise=False), learning(vectorise=True)
    single.train(3)
    grouped.train(3)
    np.testing.assert_allclose(theta(single), theta(grouped), atol=1e-6)


class Numbered:
    """A mover whose movements are its tasks' seeds."""

    group = 3
    layout = ()

    def move(self, journeys, terms, parts):
        if any(journey.order_seed == 99 for journey in journeys):
            raise SystemExit("as a process that is killed")
        return [
            LocalUpdate(np.full_like(journey.start, journey.order_seed), 2, 0.5)
            for journey in journeys
        ]

    def evaluate(self, theta):
        return None


def groups(seeds):
    for start in range(0, len(seeds), 3):
        yield [Task(f"client-{seed}", seed) for seed in seeds[start : start + 3]]


def test_results_come_in_the_order_of_the_groups_whoever_made_them() -> None:
    from fedloom.strategies import ServerState

    terms = LocalTraining(optimizer=Optimizer.SGD)
    state = ServerState(np.zeros(4, np.float32))
    crews = [Alone(Numbered()), Processes(Numbered, 3, 4, terms, 4)]
    found = []
    for crew in crews:
        crew.begin(state, terms)
        values = []
        for outcomes in crew.trained(groups(range(32))):
            assert all(isinstance(outcome, Trained) for outcome in outcomes)
            values += [float(outcome.values[0]) for outcome in outcomes]
        found.append(values)
        crew.close()
    assert found == [[float(seed) for seed in range(32)]] * 2


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_is_told() -> None:
    from fedloom.strategies import ServerState

    terms = LocalTraining(optimizer=Optimizer.SGD)
    crew = Processes(Numbered, 3, 2, terms, 4)
    crew.begin(ServerState(np.zeros(4, np.float32)), terms)
    with pytest.raises(WorkerLost, match="worker"):
        list(crew.trained(groups([1, 2, 3, 99])))
    crew.close()
