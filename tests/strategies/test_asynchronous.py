"""FedBuff and FedAsync against their papers, and on a problem whose optimum is known."""

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import joined, outgoing
from fedloom.strategies import ServerState, algorithm
from fedloom.strategies.staleness import staleness_factor
from fedloom.terms import LocalTraining, Optimizer, StalenessWeighting, Strategy, Weighting
from tests.strategies.federation import (
    Device,
    Float32,
    Float64,
    held_since,
    layout_of,
    mean_of,
    move,
    trained,
)
from tests.strategies.samples import terms_of
from tests.strategies.test_convergence import DEVICES, OPTIMUM, START, distance, quadratic_devices

P = 6
_seeds = st.integers(0, 2**32 - 1)
# Round by round: of each member the staleness, no more than there are rounds, and its samples.
_rounds = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 100)), min_size=1, max_size=4),
    min_size=1,
    max_size=6,
)
_weightings = st.sampled_from(
    [
        {"staleness_weighting": StalenessWeighting.CONSTANT, "staleness_exponent": 0.0},
        {"staleness_exponent": 0.5},
        {
            "staleness_weighting": StalenessWeighting.HINGE,
            "staleness_exponent": 10.0,
            "staleness_threshold": 1,
        },
    ]
)


def s(terms: LocalTraining, t: int) -> float:
    """The papers' three families, written down once more."""
    a, b = terms.staleness_exponent, terms.staleness_threshold
    if terms.staleness_weighting is StalenessWeighting.CONSTANT:
        return 1.0
    if terms.staleness_weighting is StalenessWeighting.POLYNOMIAL:
        return math.pow(t + 1, -a)
    return 1.0 if t <= b else 1 / (a * (t - b) + 1)


@dataclass
class Oracle:
    """The server of a paper, which remembers every x_t, in float64."""

    terms: LocalTraining
    models: list[Float64]

    def fedbuff(self, updates: list[tuple[int, int, Float64]]) -> None:
        """w <- w + eta_g / n sum_i n_i s(tau_i) Delta_i."""
        n = sum(weight for _, weight, _ in updates)
        w = self.models[-1]
        for staleness, weight, delta in updates:
            step = weight / n * s(self.terms, staleness) * delta
            w = w + self.terms.server_learning_rate * step
        self.models.append(w)

    def fedasync(self, updates: list[tuple[int, int, Float64]]) -> None:
        """x <- the mean of (1 - alpha_t) x + alpha_t x_new, x_new = x_tau + what it moved."""
        n, x = sum(weight for _, weight, _ in updates), self.models[-1]
        mixed = np.zeros_like(x)
        for staleness, weight, delta in updates:
            x_new = self.models[-1 - staleness] + delta
            alpha = self.terms.mixing * s(self.terms, staleness)
            mixed = mixed + weight / n * ((1 - alpha) * x + alpha * x_new)
        self.models.append(mixed)


@pytest.mark.parametrize("strategy", [Strategy.FED_BUFF, Strategy.FED_ASYNC])
@given(seed=_seeds, rounds=_rounds, weighting=_weightings, uniform=st.booleans())
def test_a_sum_of_stale_updates_is_the_papers(
    strategy: Strategy,
    seed: int,
    rounds: list[list[tuple[int, int]]],
    weighting: dict[str, float],
    uniform: bool,
) -> None:
    changes = {"mixing": 0.7} if strategy is Strategy.FED_ASYNC else {"server_learning_rate": 0.8}
    if uniform:
        changes["weighting"] = Weighting.UNIFORM
    terms = terms_of(strategy, **(weighting | changes))
    random, rule = np.random.default_rng(seed), algorithm(terms)
    start = random.standard_normal(P).astype(np.float32)
    states, oracle = [rule.init(start)], Oracle(terms, [start.astype(np.float64)])
    for members in rounds:
        sent, told = [], []
        for drawn, samples in members:
            staleness = min(drawn, len(states) - 1)
            base, delta = states[-1 - staleness], random.standard_normal(P).astype(np.float32)
            update = outgoing(terms, base, (), LocalUpdate(delta.copy(), samples, 0.0))
            held = held_since(base.rounds, update)
            sent.append(joined(terms, states[-1], layout_of(start), held))
            told.append((staleness, 1 if uniform else samples, delta.astype(np.float64)))
        states.append(rule.apply(states[-1], mean_of(sent), len(sent)))
        getattr(oracle, strategy.name.lower().replace("_", ""))(told)
        np.testing.assert_allclose(states[-1].theta, oracle.models[-1], rtol=2e-5, atol=2e-5)


@given(st.integers(0, 10**6), _weightings)
def test_older_updates_never_count_for_more(staleness: int, weighting: dict[str, float]) -> None:
    terms = terms_of(Strategy.FED_BUFF, **weighting)
    older, newer = staleness_factor(terms, staleness + 1), staleness_factor(terms, staleness)
    assert 0 < older <= newer <= staleness_factor(terms, 0) == 1
    assert newer == pytest.approx(s(terms, staleness))


@pytest.mark.parametrize("strategy", [Strategy.FED_BUFF, Strategy.FED_ASYNC])
def test_without_staleness_and_mixing_both_are_fedavg(strategy: Strategy) -> None:
    shared = {"optimizer": Optimizer.SGD, "learning_rate": 0.1, "batch_size": 1, "local_steps": 3}
    mixing = {"mixing": 1.0} if strategy is Strategy.FED_ASYNC else {}
    ends = []
    for terms in (terms_of(Strategy.FED_AVG, **shared), terms_of(strategy, **shared, **mixing)):
        state, devices = algorithm(terms).init(START.copy()), quadratic_devices((1, 2, 3, 4))
        for _ in range(5):
            sent = [move(device, state, terms, layout_of(START)) for device in devices]
            state = algorithm(terms).apply(state, mean_of(sent), len(sent))
        ends.append(state.theta)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5, atol=1e-5)


def test_the_proximal_term_is_fedasyncs_rho() -> None:
    """rho / 2 |x - x_tau|^2 beside the loss: a device stays nearer to where it began."""
    shared = {"optimizer": Optimizer.SGD, "learning_rate": 0.1, "local_steps": 20}
    terms = terms_of(Strategy.FED_ASYNC, **shared)
    [device, *_] = quadratic_devices()
    near, far = (
        np.linalg.norm(trained(device, START, replace(terms, proximal_mu=mu), None, None))
        for mu in (1.0, 0.0)
    )
    assert near < 0.9 * far


def delayed(terms: LocalTraining, rounds: int) -> Float32:
    """Let every device's update come `its index` rounds late, again and again."""
    devices: list[Device] = quadratic_devices()
    rule, layout = algorithm(terms), layout_of(START)
    states: deque[ServerState] = deque([rule.init(START.copy())], maxlen=DEVICES)
    for _ in range(rounds):
        sent = []
        for index, device in enumerate(devices):
            base = states[-1 - min(index, len(states) - 1)]
            moved = trained(device, base.theta, terms, None, None)
            update = outgoing(terms, base, (), LocalUpdate(moved, 1, 0.0))
            sent.append(joined(terms, states[-1], layout, held_since(base.rounds, update)))
        states.append(rule.apply(states[-1], mean_of(sent), len(sent)))
    return states[-1].theta


def test_updates_that_count_alike_end_at_the_optimum_however_late() -> None:
    shared = {"optimizer": Optimizer.SGD, "learning_rate": 0.05, "local_steps": 1}
    alike = {"staleness_weighting": StalenessWeighting.CONSTANT, "staleness_exponent": 0.0}
    terms = terms_of(Strategy.FED_BUFF, weighting=Weighting.UNIFORM, **shared, **alike)
    assert distance(delayed(terms, 3000)) < 1e-3


def test_updates_that_count_by_age_end_at_the_optimum_of_what_counts() -> None:
    """A bias of the papers, not ours: whoever is always late weighs less in the objective."""
    shared = {"optimizer": Optimizer.SGD, "learning_rate": 0.05, "local_steps": 1}
    terms = terms_of(Strategy.FED_BUFF, weighting=Weighting.UNIFORM, **shared)
    devices, factors = quadratic_devices(), [s(terms, index) for index in range(DEVICES)]
    zero, basis = np.zeros(len(START)), np.eye(len(START))

    def slope(w: Float64) -> Float64:
        found: Float64 = sum(f * d.gradient(w) for f, d in zip(factors, devices, strict=True))
        return found

    hessian = np.stack([slope(row) - slope(zero) for row in basis], axis=1)
    stated = np.linalg.solve(hessian, -slope(zero))
    end = delayed(terms, 3000)
    assert distance(end, stated) < 1e-3
    assert distance(end, OPTIMUM) > 10 * distance(end, stated)
