"""FedAdagrad, FedAdam, FedYogi: Reddi et al., arXiv:2003.00295v5, Algorithm 2.

    m <- beta_1 m + (1 - beta_1) Delta
    v <- v + Delta^2                                        (FedAdagrad)
    v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)         (FedYogi)
    v <- beta_2 v + (1 - beta_2) Delta^2                    (FedAdam)
    x <- x + eta m / (sqrt(v) + tau)

Delta is the mean movement. m begins with 0 and v with tau^2, the least that the paper allows. There
is no bias correction, as in the paper. Deviation: Delta is weighted by the run's weighting; the
paper's Algorithm 2 has a plain mean, its experiments weigh by samples.
"""

from collections.abc import Callable

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import (
    Vector,
    add,
    blocks,
    constant,
    divide,
    flush,
    flushed,
    multiply,
    subtract,
)
from fedloom.strategies.rule import Algorithm, Rule, ServerState, zeros
from fedloom.terms import LocalTraining, Strategy

_Second = Callable[[Vector, Vector], None]  # moves v, given Delta^2, which it may use up


def _adagrad(terms: LocalTraining) -> _Second:
    del terms
    return add


def _adam(terms: LocalTraining) -> _Second:
    beta = constant(terms.server_second_momentum)
    rest = constant(1 - terms.server_second_momentum)

    def move(v: Vector, square: Vector) -> None:
        multiply(v, beta)
        multiply(square, rest)
        add(v, square)

    return move


def _yogi(terms: LocalTraining) -> _Second:
    rest = constant(1 - terms.server_second_momentum)

    def move(v: Vector, square: Vector) -> None:
        difference = v.copy()
        subtract(difference, square)
        multiply(square, rest)
        multiply(square, np.sign(difference))
        subtract(v, square)

    return move


def _adaptive(terms: LocalTraining, second: _Second) -> Algorithm:
    beta, rest = constant(terms.server_momentum), constant(1 - terms.server_momentum)
    rate, tau = constant(terms.server_learning_rate), constant(terms.server_adaptivity)
    least = constant(terms.server_adaptivity**2)

    def init(theta: Theta) -> ServerState:
        return ServerState(theta, vectors=(zeros(theta), zeros(theta) + least))

    @np.errstate(over="ignore", invalid="ignore")  # squares of what no model survives anyway
    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        del count
        first, seconds = (vector.copy() for vector in state.vectors)
        for block in blocks(len(mean_update)):
            m, v, moved = first[block], seconds[block], mean_update[block]
            flush(moved)
            square = moved.copy()
            multiply(square, moved)
            second(v, square)
            multiply(moved, rest)
            multiply(m, beta)
            add(m, moved)
            divisor = np.sqrt(v)
            add(divisor, tau)
            moved[:] = m
            divide(moved, divisor)
            multiply(moved, rate)
            add(moved, flushed(state.theta[block]))
        return ServerState(mean_update, state.rounds + 1, (first, seconds))

    return Algorithm(apply, init)


def _rule(strategy: Strategy, name: str, second: Callable[[LocalTraining], _Second]) -> Rule:
    return Rule(
        strategy,
        name,
        "arXiv:2003.00295v5, Algorithm 2",
        lambda terms: _adaptive(terms, second(terms)),
        keeps=("first moment", "second moment"),
    )


FED_ADAGRAD = _rule(Strategy.FED_ADAGRAD, "FedAdagrad", _adagrad)
FED_ADAM = _rule(Strategy.FED_ADAM, "FedAdam", _adam)
FED_YOGI = _rule(Strategy.FED_YOGI, "FedYogi", _yogi)
