"""FedAvg and FedProx against the papers: an oracle in float64, and convergence to an optimum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedloom.strategies import ServerState, algorithm, federated_averaging, proximal_gradient
from fedloom.terms import LocalTraining, Optimizer

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
EPSILON = float(np.finfo(np.float32).eps)
_values = hnp.arrays(np.float32, 17, elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))
_rates = st.floats(0.0, 10.0, width=32)


def mcmahan(models: list[Float64], samples: list[int]) -> Float64:
    """arXiv:1602.05629v4, algorithm 1: w_{t+1} <- sum_k (n_k / n) w^k_{t+1}."""
    total = np.zeros_like(models[0])
    for model, n_k in zip(models, samples, strict=True):
        total += (n_k / sum(samples)) * model
    return total


def mean_update(theta: Float32, models: list[Float64], samples: list[int]) -> Float32:
    """What a protection delivers of the clients' movements."""
    weighted = sum(n * (model - theta) for model, n in zip(models, samples, strict=True))
    return np.asarray(weighted / sum(samples), np.float32)


@given(
    theta=_values,
    clients=st.lists(st.tuples(_values, st.integers(1, 10_000)), min_size=1, max_size=6),
)
def test_a_step_is_the_mean_of_the_models_weighted_by_samples(
    theta: Float32, clients: list[tuple[Float32, int]]
) -> None:
    models = [model.astype(np.float64) for model, _ in clients]
    samples = [n for _, n in clients]
    rule = federated_averaging()
    state = rule.apply(rule.init(theta), mean_update(theta, models, samples), len(models))
    assert state.theta.dtype == np.float32
    # theta is at most 1e3, a movement 2e3, and each of the two is rounded once.
    np.testing.assert_allclose(state.theta, mcmahan(models, samples), rtol=0, atol=4e3 * EPSILON)


@given(theta=_values, update=_values, rate=_rates)
def test_the_server_goes_its_rate_times_the_mean(
    theta: Float32, update: Float32, rate: float
) -> None:
    state = federated_averaging(rate).apply(ServerState(theta), update.copy(), 1)
    expected = theta.astype(np.float64) + rate * update.astype(np.float64)
    np.testing.assert_allclose(state.theta, expected, rtol=0, atol=2.2e4 * EPSILON)
    if rate == 0:
        np.testing.assert_array_equal(state.theta, theta)


@given(theta=_values, updates=st.lists(_values, min_size=1, max_size=4), rate=_rates)
def test_equal_sums_give_equal_bits_and_old_states_stay(
    theta: Float32, updates: list[Float32], rate: float
) -> None:
    before = theta.tobytes()

    def run(start: Float32) -> ServerState:
        rule = federated_averaging(rate)
        state = rule.init(start)
        for update in updates:
            earlier = state.theta.tobytes()
            following = rule.apply(state, update.copy(), 1)
            assert state.theta.tobytes() == earlier
            assert following.theta is not state.theta
            state = following
        return state

    first, second = run(theta), run(theta.copy())
    assert first.theta.tobytes() == second.theta.tobytes()
    assert first.rounds == second.rounds == len(updates)
    assert before == theta.tobytes()
    # Value by value: a device that applies the sum in blocks gets the same bits.
    rule = federated_averaging(rate)
    blocks = [
        rule.apply(ServerState(theta[i : i + 5]), updates[0][i : i + 5].copy(), 1)
        for i in (0, 5, 10)
    ]
    whole = rule.apply(ServerState(theta), updates[0].copy(), 1).theta
    assert np.concatenate([block.theta for block in blocks]).tobytes() == whole[:15].tobytes()


# on quadratics F_k(w) = 1/2 (w - c_k)' H (w - c_k): with one H the optimum is the mean of the c_k

CENTRES = np.array([[4.0, -2.0, 1.0], [0.0, 3.0, -5.0], [-1.0, 1.0, 0.5]])
SAMPLES = [100, 10, 40]
HESSIAN = np.array([[3.0, 0.5, 0.0], [0.5, 2.0, 0.3], [0.0, 0.3, 1.0]])
OPTIMUM = np.average(CENTRES, axis=0, weights=SAMPLES)


def train(theta: Float32, centre: Float64, mu: float = 0.0, steps: int = 20) -> Float64:
    """Gradient descent on one client's quadratic, as a device does it: in float32."""
    local = theta.copy()
    for _ in range(steps):
        gradient = np.asarray(HESSIAN @ (local - centre), np.float32)
        proximal_gradient(gradient, local, theta, mu)
        local -= np.float32(0.2) * gradient
    return local.astype(np.float64)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_federated_averaging_reaches_the_optimum(mu: float) -> None:
    rule = federated_averaging()
    state = rule.init(np.array([50, -50, 25], np.float32))
    for _ in range(40):
        models = [train(state.theta, centre, mu) for centre in CENTRES]
        state = rule.apply(state, mean_update(state.theta, models, SAMPLES), 3)
    np.testing.assert_allclose(state.theta, OPTIMUM, atol=1e-5)


def test_an_unweighted_mean_would_end_elsewhere() -> None:
    assert np.abs(OPTIMUM - CENTRES.mean(axis=0)).max() > 0.5


@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0, 10.0])
def test_a_client_of_fedprox_ends_at_the_minimum_of_its_proximal_objective(mu: float) -> None:
    """arXiv:1812.06127v5, algorithm 2: min F_k(w) + mu/2 |w - w_t|^2, in closed form."""
    theta = np.array([10, 10, 10], np.float32)
    centre = CENTRES[0]
    expected = np.linalg.solve(
        HESSIAN + mu * np.eye(3), HESSIAN @ centre + mu * theta.astype(np.float64)
    )
    local = theta.copy()
    for _ in range(400):
        gradient = np.asarray(HESSIAN @ (local - centre), np.float32)
        proximal_gradient(gradient, local, theta, mu)
        local -= np.float32(0.1) * gradient
    np.testing.assert_allclose(local, expected, atol=1e-4)


def test_a_larger_mu_keeps_a_client_closer() -> None:
    theta = np.array([10, 10, 10], np.float32)
    distances = [
        np.linalg.norm(train(theta, CENTRES[0], mu) - theta) for mu in (0.0, 0.1, 1.0, 5.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 2 * distances[-1]


@given(gradient=_values, local=_values, start=_values, mu=_rates)
def test_the_proximal_term_is_added_in_place(
    gradient: Float32, local: Float32, start: Float32, mu: float
) -> None:
    expected = gradient.astype(np.float64) + mu * (local.astype(np.float64) - start)
    before = (gradient.tobytes(), local.tobytes(), start.tobytes())
    proximal_gradient(gradient, local, start, mu)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=4.2e4 * EPSILON)
    assert (local.tobytes(), start.tobytes()) == before[1:]
    if mu == 0:
        assert gradient.tobytes() == before[0]


def test_the_optimizer_does_not_choose_the_server_rule() -> None:
    update = np.ones(2, np.float32)
    states = [
        algorithm(LocalTraining(optimizer=optimizer)).apply(ServerState(update), update.copy(), 1)
        for optimizer in Optimizer
    ]
    assert states[0].theta.tobytes() == states[1].theta.tobytes()
