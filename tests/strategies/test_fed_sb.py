"""Fed-SB: R of B R A against the paper's law and a convex problem's optimum."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies import algorithm, update_length
from fedloom.strategies.portions import parts_of
from fedloom.terms import LocalTraining, LoraRule, Optimizer, Personal
from tests.strategies.federation import Device, Float64, first_state, run, run_round

OUT, IN, RANK = 6, 5, 3
LAYOUT = (
    TrainableTensor("r", (RANK, RANK), 0, Role.LORA_R),
    TrainableTensor("head", (2,), RANK**2, Role.HEAD),
)
P = RANK**2 + 2


def terms_of(**changes: Any) -> LocalTraining:
    """Return SGD under Fed-SB."""
    values: dict[str, Any] = {
        "lora": LoraRule.FED_SB,
        "optimizer": Optimizer.SGD,
        "learning_rate": 0.5,
        "batch_size": 1,
    }
    return LocalTraining(**(values | changes))


def factors(seed: int) -> tuple[Float64, Float64]:
    """Return B (out, r) and A (r, in), orthonormal."""
    random = np.random.default_rng(seed)
    b, _ = np.linalg.qr(random.standard_normal((OUT, RANK)))
    a, _ = np.linalg.qr(random.standard_normal((IN, RANK)))
    return b, a.T


def fitting(target: Float64, b: Float64, a: Float64, samples: int) -> Device:
    """Return a device whose loss is |B R A - M|^2 / 2: convex in R."""

    def gradient(theta: Float64) -> Float64:
        error = b @ theta[: RANK**2].reshape(RANK, RANK) @ a - target
        return np.concatenate([(b.T @ error @ a.T).ravel(), np.zeros(2)])

    return Device(gradient, samples)


def product(theta: Any, b: Float64, a: Float64) -> Float64:
    """Return B R A."""
    found: Float64 = b @ theta[: RANK**2].astype(np.float64).reshape(RANK, RANK) @ a
    return found


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_the_mean_of_products_is_exact(seed: int, samples: list[int]) -> None:
    """sum_k p_k B R_k A, each device's own, is B R A of the round's end."""
    random, (b, a) = np.random.default_rng(seed), factors(seed)
    targets = [random.standard_normal((OUT, IN)) for _ in samples]
    devices = [fitting(m, b, a, n) for m, n in zip(targets, samples, strict=True)]
    terms, theta = terms_of(), random.standard_normal(P).astype(np.float32)
    state = first_state(terms, theta, devices)
    alone = [run_round(terms, state, [device], 2, LAYOUT).theta for device in devices]
    together = run_round(terms, state, devices, 2, LAYOUT).theta
    weights = np.array(samples) / sum(samples)
    expected = sum(p * product(t, b, a) for p, t in zip(weights, alone, strict=True))
    np.testing.assert_allclose(product(together, b, a), expected, atol=1e-5)


def test_it_ends_at_the_optimum() -> None:
    """Orthonormal factors: R = B^T M A^T of the weighted mean M, whatever the devices disagree."""
    random, (b, a) = np.random.default_rng(5), factors(5)
    samples = (1, 2, 5)
    targets = [random.standard_normal((OUT, IN)) for _ in samples]
    devices = [fitting(m, b, a, n) for m, n in zip(targets, samples, strict=True)]
    theta = run(terms_of(local_steps=2), np.zeros(P, np.float32), devices, 40, None, LAYOUT)
    mean = np.average(targets, axis=0, weights=samples)
    found = theta[: RANK**2].reshape(RANK, RANK)
    np.testing.assert_allclose(found, b.T @ mean @ a.T, atol=1e-5)


def test_an_update_has_r_squared_values_whatever_the_matrix() -> None:
    assert update_length(terms_of(), LAYOUT) == P
    assert update_length(terms_of(), LAYOUT[:1]) == RANK**2
    own = terms_of(personal=Personal.FEDPER)
    assert update_length(own, LAYOUT) == RANK**2


@pytest.mark.parametrize("lora", [LoraRule.FEDIT, LoraRule.FFA])
def test_such_a_plan_means_the_same_under_rules_that_freeze_no_r(lora: LoraRule) -> None:
    expected = parts_of(terms_of(), LAYOUT, 0)
    assert parts_of(LocalTraining(lora=lora), LAYOUT, 0) == expected


@pytest.mark.parametrize("lora", [LoraRule.ROLORA, LoraRule.FEDSA, LoraRule.HETLORA])
def test_rules_of_two_factors_are_refused_with_the_nearest(lora: LoraRule) -> None:
    with pytest.raises(Refused, match=r"LORA_A and LORA_B .* lora = 'fed_sb'"):
        algorithm(LocalTraining(lora=lora), LAYOUT)


def test_a_plan_without_an_r_is_refused_with_the_nearest() -> None:
    factored = (
        TrainableTensor("a", (2, 4), 0, Role.LORA_A),
        TrainableTensor("b", (3, 2), 8, Role.LORA_B),
    )
    with pytest.raises(Refused, match=r"built with --lora sb\); .* lora = 'ffa'"):
        algorithm(terms_of(), factored)
