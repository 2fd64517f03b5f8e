"""The optimisers' arithmetic is torch's; the agent does without torch, these tests do not."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.optimisers import Adagrad, AdamW, Optimizer, Sgd, optimizer_for
from fedloom.terms import LocalTraining
from fedloom.terms import Optimizer as Kind

P = 1000
STEPS = 50


def _gradients() -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.standard_normal(P).astype(np.float32) for _ in range(STEPS)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [None, "adagrad", 0.0, 0.9])
def test_fifty_steps_equal_torch(weight_decay: float, momentum: float | str | None) -> None:
    torch = pytest.importorskip("torch")
    theta = np.random.default_rng(4).standard_normal(P).astype(np.float32)
    reference = torch.nn.Parameter(torch.tensor(theta))
    ours: Optimizer
    if momentum is None:
        ours = AdamW(P, 1e-2, weight_decay)
        theirs = torch.optim.AdamW([reference], lr=1e-2, weight_decay=weight_decay)
    elif isinstance(momentum, str):
        ours = Adagrad(P, 1e-2, weight_decay)
        theirs = torch.optim.Adagrad([reference], lr=1e-2, weight_decay=weight_decay)
    else:
        ours = Sgd(P, 1e-2, momentum, weight_decay)
        theirs = torch.optim.SGD([reference], lr=1e-2, momentum=momentum, weight_decay=weight_decay)
    for step, gradient in enumerate(_gradients()):
        reference.grad = torch.tensor(gradient)
        factor = 0.5 + 0.5 * (step % 2)  # as a schedule has it
        theirs.param_groups[0]["lr"] = 1e-2 * factor
        theirs.step()
        ours.step(theta, gradient, factor)
    expected = reference.detach().numpy()
    assert np.linalg.norm(theta - expected) <= 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "make",
    [lambda: AdamW(P, 0.1, 0.1), lambda: Sgd(P, 0.1, 0.9, 0.1), lambda: Adagrad(P, 0.1, 0.1)],
)
def test_a_step_works_in_place_and_leaves_the_gradient(make: Callable[[], Optimizer]) -> None:
    theta = np.ones(P, np.float32)
    gradient = _gradients()[0]
    before = gradient.copy()
    address = theta.ctypes.data
    make().step(theta, gradient)
    assert theta.dtype == np.float32
    assert theta.ctypes.data == address
    assert not (theta == 1).all()
    np.testing.assert_array_equal(gradient, before)


@given(st.floats(1e-3, 1e3), st.floats(1e-4, 1.0))
def test_adamws_first_step_is_the_learning_rate_whatever_the_gradient(
    scale: float, learning_rate: float
) -> None:
    theta = np.zeros(2, np.float32)
    AdamW(2, learning_rate).step(theta, np.array([scale, -scale], np.float32))
    np.testing.assert_allclose(theta, [-learning_rate, learning_rate], rtol=1e-4)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=10))
def test_sgd_without_momentum_is_linear_in_the_gradients(values: list[float]) -> None:
    theta = np.zeros(1, np.float32)
    optimizer = Sgd(1, 0.5)
    for value in values:
        optimizer.step(theta, np.array([value], np.float32))
    assert theta[0] == pytest.approx(-0.5 * sum(values), abs=1e-4)


def test_the_terms_choose_the_optimiser() -> None:
    assert isinstance(optimizer_for(LocalTraining(optimizer=Kind.ADAMW), P), AdamW)
    assert isinstance(optimizer_for(LocalTraining(optimizer=Kind.SGD), P), Sgd)
    assert isinstance(optimizer_for(LocalTraining(optimizer=Kind.ADAGRAD), P), Adagrad)
