"""Whole runs on problems whose optimum is known, with devices that differ: what papers promise."""

from typing import Any

import numpy as np
import pytest

from fedloom.terms import LocalTraining, Optimizer, Schedule, Strategy, Weighting
from tests.strategies.federation import Device, Float32, Float64, run
from tests.strategies.samples import terms_of

DIM, DEVICES = 5, 4
SGD: dict[str, Any] = {"optimizer": Optimizer.SGD, "learning_rate": 0.1, "batch_size": 1}
START = np.full(DIM, 3, np.float32)


def quadratics() -> tuple[list[tuple[Float64, Float64]], Float64]:
    """Return (H_k, b_k) of F_k(w) = 1/2 w'H_k w - b_k'w, and the optimum of their mean."""
    random = np.random.default_rng(1)
    problems = []
    for _ in range(DEVICES):
        root = random.standard_normal((DIM, DIM))
        hessian = root @ root.T / DIM + 0.3 * np.eye(DIM)
        problems.append((hessian, hessian @ (4 * random.standard_normal(DIM))))
    matrices = np.mean([hessian for hessian, _ in problems], axis=0)
    return problems, np.linalg.solve(matrices, np.mean([b for _, b in problems], axis=0))


PROBLEMS, OPTIMUM = quadratics()


def quadratic_devices(samples: tuple[int, ...] = (1,) * DEVICES) -> list[Device]:
    """Return devices that minimise one quadratic each."""
    return [
        Device(lambda w, h=hessian, b=b: h @ w - b, count)  # type: ignore[misc]
        for (hessian, b), count in zip(PROBLEMS, samples, strict=True)
    ]


def distance(theta: Float32, optimum: Float64 = OPTIMUM) -> float:
    """Return how far the run ended from the optimum."""
    return float(np.linalg.norm(theta - optimum))


def drifting(strategy: Strategy, **changes: Any) -> LocalTraining:
    """Return terms with so many local steps that clients end near their own optima."""
    values = SGD | {"local_steps": 50, "weighting": Weighting.UNIFORM} | changes
    return terms_of(strategy, **values)


def test_fedavg_with_many_local_steps_ends_elsewhere() -> None:
    assert distance(run(drifting(Strategy.FED_AVG), START, quadratic_devices(), 200)) > 0.3


def test_scaffold_ends_at_the_optimum_all_the_same() -> None:
    terms = drifting(Strategy.SCAFFOLD, population=DEVICES)
    assert distance(run(terms, START, quadratic_devices(), 200)) < 1e-3


def test_scaffold_ends_there_with_half_of_the_devices_a_round() -> None:
    terms = drifting(Strategy.SCAFFOLD, population=DEVICES, local_steps=20)
    random = np.random.default_rng(2)

    def sampled(number: int) -> list[int]:
        return [int(i) for i in random.choice(DEVICES, 2, replace=False)]

    assert distance(run(terms, START, quadratic_devices(), 400, sampled)) < 5e-3


@pytest.mark.parametrize("change", [{"momentum": 0.5}, {"step_schedule": Schedule.COSINE}], ids=str)
def test_scaffold_ends_there_when_steps_are_not_equal(change: dict[str, Any]) -> None:
    terms = drifting(Strategy.SCAFFOLD, population=DEVICES, **change)
    assert distance(run(terms, START, quadratic_devices(), 200)) < 1e-3


def test_scaffold_with_a_wrong_population_does_not() -> None:
    """N too large for ever: c lags, and half of it is missing; this is what the check is for."""
    right = drifting(Strategy.SCAFFOLD, population=DEVICES)
    wrong = drifting(Strategy.SCAFFOLD, population=10 * DEVICES)
    few = 10
    assert distance(run(wrong, START, quadratic_devices(), few)) > distance(
        run(right, START, quadratic_devices(), few)
    )


def test_feddyn_ends_at_the_optimum_too() -> None:
    terms = drifting(Strategy.FED_DYN, dynamic_alpha=0.5, population=DEVICES, local_steps=100)
    assert distance(run(terms, START, quadratic_devices(), 200)) < 1e-3


def test_feddyn_ends_there_with_half_of_the_devices_a_round() -> None:
    terms = drifting(Strategy.FED_DYN, dynamic_alpha=0.5, population=DEVICES, local_steps=100)
    random = np.random.default_rng(3)

    def sampled(number: int) -> list[int]:
        return [int(i) for i in random.choice(DEVICES, 2, replace=False)]

    assert distance(run(terms, START, quadratic_devices(), 500, sampled)) < 5e-3


def test_fednova_minimises_the_stated_objective_under_unequal_steps() -> None:
    """Wang et al., section 1: with tau_i unequal FedAvg weighs client i by p_i tau_i."""
    samples = (1, 2, 10, 40)
    p = np.array(samples) / sum(samples)
    matrix = np.sum([w * hessian for w, (hessian, _) in zip(p, PROBLEMS, strict=True)], axis=0)
    stated = np.linalg.solve(
        matrix, np.sum([w * b for w, (_, b) in zip(p, PROBLEMS, strict=True)], axis=0)
    )
    ends = {
        strategy: run(
            terms_of(strategy, **(SGD | {"learning_rate": 0.002})),
            START,
            quadratic_devices(samples),
            1500,
        )
        for strategy in (Strategy.FED_AVG, Strategy.FED_NOVA)
    }
    # What is left of FedNova's error is its drift, of the order of the learning rate.
    assert distance(ends[Strategy.FED_NOVA], stated) < 0.15
    assert distance(ends[Strategy.FED_AVG], stated) > 5 * distance(ends[Strategy.FED_NOVA], stated)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        (Strategy.FED_AVG_M, {"server_momentum": 0.9, "server_learning_rate": 0.1}),
        (Strategy.FED_ADAGRAD, {"server_learning_rate": 0.5, "server_momentum": 0.0}),
        (Strategy.FED_ADAM, {"server_learning_rate": 0.05, "round_schedule": Schedule.COSINE}),
        (Strategy.FED_YOGI, {"server_learning_rate": 0.05, "round_schedule": Schedule.COSINE}),
        (Strategy.FED_PROX, {"proximal_mu": 0.1}),
    ],
    ids=lambda value: value.name if isinstance(value, Strategy) else "",
)
def test_servers_with_momenta_reach_the_optimum_where_devices_do_not_drift(
    strategy: Strategy, changes: dict[str, Any]
) -> None:
    terms = drifting(strategy, local_steps=1, **changes)
    assert distance(run(terms, START, quadratic_devices(), 600)) < 0.05


# logistic regression, where gradients are not linear


def logistic() -> tuple[list[Device], Float64]:
    """Return devices with one kind of inputs each, and the optimum of their mean by Newton."""
    random = np.random.default_rng(4)
    truth = random.standard_normal(DIM)
    data = []
    for k in range(DEVICES):
        inputs = random.standard_normal((60, DIM)) + 2 * np.eye(DEVICES, DIM)[k]
        chance = 1 / (1 + np.exp(-inputs @ truth))
        data.append((inputs, (random.random(60) < chance).astype(float)))

    def gradient(w: Float64, k: int) -> Float64:
        inputs, labels = data[k]
        errors = 1 / (1 + np.exp(-inputs @ w)) - labels
        slope: Float64 = inputs.T @ errors / len(labels) + 0.05 * w
        return slope

    w = np.zeros(DIM)
    for _ in range(50):
        curvature = 0.05 * np.eye(DIM)
        for inputs, _ in data:
            s = 1 / (1 + np.exp(-inputs @ w))
            curvature += inputs.T @ (inputs * (s * (1 - s))[:, None]) / (60 * DEVICES)
        w = w - np.linalg.solve(curvature, np.mean([gradient(w, k) for k in range(DEVICES)], 0))
    devices = [Device(lambda w, k=k: gradient(w, k), 1) for k in range(DEVICES)]  # type: ignore[misc]
    return devices, w


def test_on_logistic_regression_drift_is_corrected_as_well() -> None:
    devices, optimum = logistic()
    start, common = np.zeros(DIM, np.float32), {"local_steps": 60, "learning_rate": 0.3}
    ends = {
        strategy: distance(run(drifting(strategy, **(common | more)), start, devices, 150), optimum)
        for strategy, more in {
            Strategy.FED_AVG: {},
            Strategy.SCAFFOLD: {"population": DEVICES},
            Strategy.FED_DYN: {"population": DEVICES, "dynamic_alpha": 0.1},
        }.items()
    }
    assert ends[Strategy.FED_AVG] > 0.1
    assert ends[Strategy.SCAFFOLD] < 1e-3
    assert ends[Strategy.FED_DYN] < 1e-2
