"""Who trains a client changes no bit of the model."""

import numpy as np
import pytest

from edge_agent.engine import LocalUpdate
from fedloom.terms import LocalTraining, Optimizer, Strategy
from simulation.movers import Alone, Task, Trained
from simulation.processes import Processes, WorkerLost
from tests.simulation.samples import FEATURES, learning, network, theta

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


@pytest.mark.parametrize(
    "compression",
    [
        {"kind": "random_mask", "share": 0.3},
        {"kind": "random_mask", "share": 0.3, "error_feedback": True},
        {"kind": "top_k"},
        {"kind": "quantised"},
    ],
    ids=str,
)
def test_what_waits_on_clients_is_the_same_whoever_trains_them(compression: dict) -> None:
    def trained(workers: int) -> np.ndarray:
        terms = {"training": {"batch_size": 8}, "compression": compression}
        fl = learning(terms=terms, cohort_size=5, workers=workers)
        fl.train(3)
        return theta(fl)

    np.testing.assert_array_equal(trained(2), trained(1))


@pytest.mark.parametrize("more", [{}, {"error_feedback": True}], ids=str)
def test_a_mask_of_all_values_changes_no_bit(more: dict) -> None:
    """And a clip that cuts values off does, unless they come back."""

    def trained(compression: dict, kind: str = "plain", clip: float = 0.0) -> np.ndarray:
        terms = {"protection": {"clip": clip}, "compression": compression}
        fl = learning(terms=terms, protection=kind)
        fl.train(4)
        return theta(fl)

    everything = {"kind": "random_mask", "share": 1 - 1e-9, **more}
    whole = trained({})
    np.testing.assert_array_equal(trained(everything), whole)
    cut, returned = trained({}, "masked", 2e-3), trained(everything, "masked", 2e-3)
    assert (np.abs(returned - whole).mean() < np.abs(cut - whole).mean()) == bool(more)


def test_dropout_follows_from_the_clients_seed_and_leaves_the_callers_alone() -> None:
    import torch

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


@pytest.mark.timeout(100)
def test_workers_do_not_wait_for_threads_that_stayed_with_the_caller() -> None:
    """A large module, and a caller whose torch has computed with several threads."""
    import torch

    def trained(workers: int) -> np.ndarray:
        torch.manual_seed(0)
        large = torch.nn.Sequential(torch.nn.Linear(FEATURES, 1 << 15), torch.nn.Linear(1 << 15, 4))
        fl = learning(clients=2, model=large, workers=workers)
        fl.train(1)
        return theta(fl)

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.ones(1 << 20).add(1).sum() == 2 << 20  # starts them
        np.testing.assert_array_equal(trained(2), trained(1))
    finally:
        torch.set_num_threads(before)


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
