"""The pure parts of benchmarks/asynchronous.py: its gradient, its devices, and who is sooner."""

import math

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.asynchronous import (
    SHAPES,
    SIGMA,
    SPREAD,
    Digits,
    cases,
    gradient,
    to_target,
)


def test_the_gradient_is_that_of_the_cross_entropy() -> None:
    """Against differences of the loss, computed here in another way."""
    random, size = np.random.default_rng(1), sum(math.prod(shape) for shape in SHAPES)
    theta = random.normal(0, 0.2, size)
    inputs, labels = random.random((5, 64)), random.integers(0, 10, 5)

    def loss(at: np.ndarray) -> float:
        first, bias, second, last = (
            piece.reshape(shape)
            for piece, shape in zip(
                np.split(at, np.cumsum([math.prod(shape) for shape in SHAPES])[:-1]),
                SHAPES,
                strict=True,
            )
        )
        logits = np.tanh(inputs @ first + bias) @ second + last
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return float(-np.log(chances[np.arange(5), labels]).mean())

    found = gradient(theta.astype(np.float32), inputs, labels)
    for index in random.choice(size, 20, replace=False):
        step = np.zeros(size)
        step[index] = 1e-5
        slope = (loss(theta + step) - loss(theta - step)) / 2e-5
        assert found[index] == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_training_times_spread_as_stated() -> None:
    drawn = np.exp(SIGMA * np.random.default_rng(2).standard_normal(200_000))
    low, high = np.percentile(drawn, [5, 95])
    assert high / low == pytest.approx(SPREAD, rel=0.02)


def test_devices_have_all_rows_between_them_and_none_twice() -> None:
    problem = Digits(20, 3)
    assert sum(len(labels) for _, labels in problem.rows) + len(problem.held_out[1]) == 1797


def test_an_asynchronous_run_is_sooner_where_devices_differ() -> None:
    by_name = {case.name: case for case in cases()}
    waiting, buffered = (
        to_target(by_name[name], 60, 1, 0.8)["seconds"]
        for name in ("FedAvg, all devices", "FedBuff, K = 10")
    )
    assert 2 * buffered < waiting
