"""Every algorithm against its paper: a slow oracle in float64, over rounds with some clients."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import outgoing
from fedloom.plans import TrainableTensor
from fedloom.schedules import effective_steps
from fedloom.strategies import RULES, ServerState, algorithm, update_length
from fedloom.terms import LocalTraining, Strategy, steps_of, weight_of
from tests.strategies.federation import Device, Float64, at_once, first_state, mean_of
from tests.strategies.oracles import Client, FedAvgM, FedDyn, FedNova, FedOpt, Scaffold
from tests.strategies.samples import ALL_TERMS, terms_of

P, N = 7, 4
LAYOUT = (TrainableTensor("weight", (P,), 0),)
_seeds = st.integers(0, 2**32 - 1)
# Who takes part, round by round: a few of N, with the number of their samples.
_rounds = st.lists(
    st.dictionaries(st.integers(0, N - 1), st.integers(1, 500), min_size=1), min_size=1, max_size=5
)


class Both:
    """The product and an oracle, told the same movements."""

    def __init__(self, terms: LocalTraining, oracle: Any, theta: Float64, seed: int) -> None:
        self.terms = terms
        self.oracle = oracle
        self.devices = [Device(lambda x: x, 1) for _ in range(N)]
        self.state: ServerState = first_state(terms, theta.astype(np.float32), self.devices)
        self.random = np.random.default_rng(seed)

    def round(self, chosen: dict[int, int]) -> None:
        """Draw what each chosen device moves; what it is told to add must be the oracle's."""
        sent, clients = [], []
        for index, samples in chosen.items():
            device = self.devices[index]
            linear = algorithm(self.terms).linear(self.state, device.memory)
            if hasattr(self.oracle, "correction"):
                assert linear is not None
                close(linear, self.oracle.correction(index))
            else:
                assert linear is None
            movement = self.random.standard_normal(P).astype(np.float32)
            update = LocalUpdate(movement.copy(), samples, 0.0)
            one = outgoing(self.terms, self.state, device.memory, update)
            assert len(one.values) == update_length(self.terms, LAYOUT)
            device.memory = one.memory
            sent.append(one)
            steps = effective_steps(self.terms, steps_of(self.terms, samples))
            rate, weight = self.terms.learning_rate, weight_of(self.terms, samples)
            clients.append(Client(movement.astype(np.float64), weight, steps, rate, index))
        self.state = algorithm(self.terms).apply(self.state, mean_of(sent), len(sent))
        self.oracle.round(clients)


def close(found: Any, expected: Any) -> None:
    """Compare within float32's rounding over a few rounds of values about 1 to 100."""
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def draw_theta(seed: int) -> Float64:
    """Return values that float32 holds."""
    drawn = np.random.default_rng(seed).standard_normal(P)
    return drawn.astype(np.float32).astype(np.float64)


@given(_seeds, _rounds, st.floats(0, 0.99), st.floats(0.1, 2))
def test_fedavgm(seed: int, rounds: list[dict[int, int]], beta: float, eta: float) -> None:
    theta = draw_theta(seed)
    terms = terms_of(Strategy.FED_AVG_M, server_momentum=beta, server_learning_rate=eta)
    both = Both(terms, FedAvgM(theta, beta, eta), theta, seed)
    for chosen in rounds:
        both.round(chosen)
        close(both.state.theta, both.oracle.w)
        close(both.state.vectors[0], -both.oracle.v)


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
@given(_seeds, _rounds, st.floats(0, 0.99), st.floats(0, 0.99), st.floats(1e-3, 1))
def test_fedopt(
    kind: str,
    seed: int,
    rounds: list[dict[int, int]],
    beta_1: float,
    beta_2: float,
    tau: float,
) -> None:
    theta, second = draw_theta(seed), 0.0 if kind == "adagrad" else beta_2
    terms = terms_of(
        Strategy[f"FED_{kind.upper()}"],
        server_momentum=beta_1,
        server_second_momentum=second,
        server_adaptivity=tau,
        server_learning_rate=0.1,
    )
    both = Both(terms, FedOpt(theta, kind, beta_1, beta_2, tau, 0.1), theta, seed)
    for chosen in rounds:
        both.round(chosen)
        close(both.state.vectors[0], both.oracle.m)
        np.testing.assert_allclose(both.state.vectors[1], both.oracle.v, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(both.state.theta, both.oracle.x, rtol=1e-3, atol=1e-3)


@given(_seeds, _rounds, st.sampled_from([0.0, 0.9]), st.integers(1, 3))
def test_fednova(seed: int, rounds: list[dict[int, int]], momentum: float, epochs: int) -> None:
    theta = draw_theta(seed)
    terms = terms_of(Strategy.FED_NOVA, momentum=momentum, epochs=epochs)
    both = Both(terms, FedNova(theta), theta, seed)
    for chosen in rounds:
        both.round(chosen)
        np.testing.assert_allclose(both.state.theta, both.oracle.x, rtol=1e-4, atol=1e-4)


@given(_seeds, _rounds, st.sampled_from([0.0, 0.9]), st.floats(0.1, 1))
def test_scaffold(seed: int, rounds: list[dict[int, int]], momentum: float, eta_g: float) -> None:
    theta = draw_theta(seed)
    terms = terms_of(
        Strategy.SCAFFOLD,
        momentum=momentum,
        server_learning_rate=eta_g,
        learning_rate=0.5,
        local_steps=3,
        population=N,
    )
    both = Both(terms, Scaffold(theta, N, eta_g), theta, seed)
    for chosen in rounds:
        both.round(chosen)
        close(both.state.theta, both.oracle.x)
        close(both.state.vectors[0], both.oracle.c)
        for device, c_i in zip(both.devices, both.oracle.c_i, strict=True):
            close(device.memory[0], c_i)
        # What makes it work: c is the mean of all c_i, whoever took part.
        close(both.state.vectors[0], np.mean([device.memory[0] for device in both.devices], axis=0))


@given(_seeds, _rounds, st.floats(0.05, 2))
def test_feddyn(seed: int, rounds: list[dict[int, int]], alpha: float) -> None:
    theta = draw_theta(seed)
    terms = terms_of(Strategy.FED_DYN, dynamic_alpha=alpha, population=N)
    both = Both(terms, FedDyn(theta, N, alpha), theta, seed)
    for chosen in rounds:
        both.round(chosen)
        np.testing.assert_allclose(both.state.theta, both.oracle.theta, rtol=1e-4, atol=1e-4)
        close(both.state.vectors[0] * np.float32(alpha), both.oracle.h)
        for device, gradient in zip(both.devices, both.oracle.gradients, strict=True):
            close(device.memory[0], gradient)


# laws that hold for every rule

ALL = pytest.mark.parametrize(
    "strategy", [terms.strategy for terms in ALL_TERMS], ids=lambda strategy: strategy.name
)


@ALL
@settings(max_examples=25)
@given(_seeds, st.integers(1, N))
def test_a_round_counts_itself_and_leaves_the_older_state(
    strategy: Strategy, seed: int, count: int
) -> None:
    terms, random = terms_of(strategy), np.random.default_rng(seed)
    rule, theta = algorithm(terms), random.standard_normal(P).astype(np.float32)
    state = rule.init(theta)
    for number in range(3):
        before = [vector.tobytes() for vector in (state.theta, *state.vectors)]
        mean = random.standard_normal(update_length(terms, LAYOUT)).astype(np.float32)
        following = rule.apply(state, mean, count)
        assert [vector.tobytes() for vector in (state.theta, *state.vectors)] == before
        assert following.rounds == number + 1
        assert len(following.vectors) == len(RULES[strategy].keeps)
        for vector in (following.theta, *following.vectors):
            assert (vector.shape, vector.dtype) == ((P,), np.dtype(np.float32))
        state = following


@ALL
def test_devices_that_stand_still_leave_the_model(strategy: Strategy) -> None:
    terms = terms_of(strategy)
    rule, theta = algorithm(terms), np.linspace(-1, 1, P, dtype=np.float32)
    state = rule.init(theta)
    memory = tuple(np.zeros(P, np.float32) for _ in RULES[strategy].remembers)
    update = LocalUpdate(np.zeros(P, np.float32), 8, 0.0)
    sent = outgoing(terms, state, memory, update)
    if terms.is_asynchronous:
        sent = at_once(terms, state, LAYOUT, sent)
    following = rule.apply(state, mean_of([sent]), 1)
    np.testing.assert_array_equal(following.theta, theta)


@ALL
def test_a_rule_says_what_it_keeps(strategy: Strategy) -> None:
    rule, terms = RULES[strategy], terms_of(strategy)
    state = algorithm(terms).init(np.zeros(P, np.float32))
    assert rule.strategy is strategy
    assert len(state.vectors) == len(rule.keeps)
    memory = tuple(np.zeros(P, np.float32) for _ in rule.remembers)
    update = LocalUpdate(np.ones(P, np.float32), 8, 0.0)
    assert len(outgoing(terms, state, memory, update).memory) == len(memory)
