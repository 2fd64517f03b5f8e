"""What terms do between a gradient and the next theta: clip, correct, schedule, step."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.local_rules import LocalSteps, clip_gradient
from fedloom.schedules import effective_steps, factor, round_terms, step_factor
from fedloom.strategies import RULES
from fedloom.terms import LocalTraining, Optimizer, Schedule, Strategy
from tests.strategies.samples import terms_of

P = 20_000  # more than a block
SGD: dict[str, Any] = {"optimizer": Optimizer.SGD, "learning_rate": 0.125}


def drawn(seed: int, size: int = P) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@given(st.integers(0, 99), st.just(0.0) | st.floats(1e-9, 1e3), st.sampled_from([1e-20, 1.0, 1e18]))
def test_a_clipped_gradient_keeps_its_direction(seed: int, norm: float, size: float) -> None:
    gradient = drawn(seed, 100) * np.float32(size)
    before = gradient.astype(np.float64)
    length = np.linalg.norm(before)
    clip_gradient(gradient, norm)
    expected = before * min(1.0, norm / length) if norm else before
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=0)


def test_the_norm_is_over_all_blocks() -> None:
    gradient = np.ones(P, np.float32)
    clip_gradient(gradient, math.sqrt(P) / 2)
    np.testing.assert_allclose(gradient, 0.5, rtol=1e-6)


def test_only_the_datas_gradient_is_clipped() -> None:
    """theta <- theta - eta (clip(g) + linear + mu (theta - start))."""
    terms = terms_of(Strategy.FED_PROX, proximal_mu=0.5, gradient_clip=1.0, **SGD)
    start, theta, linear, gradient = (drawn(seed, 9) for seed in range(4))
    clipped = gradient / max(1, np.linalg.norm(gradient))
    expected = theta - 0.125 * (clipped + linear + 0.5 * (theta - start))
    LocalSteps(start, terms, 1, linear).step(theta, gradient)
    np.testing.assert_allclose(theta, expected, rtol=1e-5, atol=1e-6)


def test_feddyns_alpha_pulls_to_the_start() -> None:
    terms = terms_of(Strategy.FED_DYN, dynamic_alpha=0.5, **SGD)
    start, theta = drawn(0, 9), drawn(1, 9)
    expected = theta - 0.125 * 0.5 * (theta - start)
    LocalSteps(start, terms, 1, np.zeros(9, np.float32)).step(theta, np.zeros(9, np.float32))
    np.testing.assert_allclose(theta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_steps_go_on_where_others_ended(optimizer: Optimizer) -> None:
    terms = LocalTraining(
        optimizer=optimizer, momentum=0.9, step_schedule=Schedule.COSINE, warmup_steps=2
    )
    gradients = [drawn(seed, 9) for seed in range(6)]
    whole, theta = LocalSteps(drawn(9, 9), terms, 6), drawn(9, 9)
    for gradient in gradients:
        whole.step(theta, gradient.copy())
    first, found = LocalSteps(drawn(9, 9), terms, 6), drawn(9, 9)
    for gradient in gradients[:3]:
        first.step(found, gradient.copy())
    second = LocalSteps(drawn(9, 9), terms, 6)
    second.restore(3, tuple(vector.copy() for vector in first.vectors))
    for gradient in gradients[3:]:
        second.step(found, gradient.copy())
    assert found.tobytes() == theta.tobytes()


# schedules


@given(st.sampled_from(Schedule), st.integers(0, 50), st.integers(1, 200))
def test_a_schedule_rises_falls_and_stays_within_one(
    schedule: Schedule, warmup: int, total: int
) -> None:
    factors = [factor(schedule, warmup, position, total) for position in range(total)]
    assert all(0 < found <= 1 for found in factors)
    rising, after = factors[:warmup], factors[warmup:]
    assert rising == [(i + 1) / warmup for i in range(len(rising))]
    assert after == sorted(after, reverse=True)
    if after:
        assert after[0] == 1
        last = (1 + math.cos(math.pi * (len(after) - 1) / len(after))) / 2
        assert after[-1] == (last if schedule is Schedule.COSINE else 1)


def test_the_learning_rate_follows_both_schedules() -> None:
    terms = LocalTraining(
        **SGD, round_schedule=Schedule.COSINE, step_schedule=Schedule.COSINE, warmup_steps=2
    )
    now = round_terms(terms, applied=2, rounds=4)
    assert now == replace(terms, learning_rate=0.125 * (1 + math.cos(math.pi / 2)) / 2)
    moved = []
    for step in range(4):
        theta = np.zeros(1, np.float32)
        local = LocalSteps(theta.copy(), now, 4)
        local.restore(step, ())
        local.step(theta, np.ones(1, np.float32))
        moved.append(-float(theta[0]))
    expected = [now.learning_rate * step_factor(terms, step, 4) for step in range(4)]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    assert expected[:2] == [now.learning_rate / 2, now.learning_rate]


@given(
    st.integers(0, 30),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from(Schedule),
    st.integers(0, 5),
)
def test_effective_steps_are_what_sgd_makes_of_equal_gradients(
    steps: int, momentum: float, schedule: Schedule, warmup: int
) -> None:
    terms = LocalTraining(
        **SGD, momentum=momentum, step_schedule=schedule, warmup_steps=warmup, local_steps=steps
    )
    theta = np.zeros(1, np.float32)
    local = LocalSteps(theta.copy(), terms, steps)
    for _ in range(steps):
        local.step(theta, np.ones(1, np.float32))
    assert -float(theta[0]) / 0.125 == pytest.approx(effective_steps(terms, steps), rel=1e-5)
    if momentum == 0 and schedule is Schedule.CONSTANT and warmup == 0:
        assert effective_steps(terms, steps) == steps


def test_every_strategy_trains() -> None:
    for strategy, rule in RULES.items():
        theta = np.ones(3, np.float32)
        linear = np.zeros(3, np.float32) if rule.remembers else None
        LocalSteps(theta.copy(), terms_of(strategy), 1, linear).step(theta, np.ones(3, np.float32))
        assert (theta < 1).all()
