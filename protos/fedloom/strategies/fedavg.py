"""FedAvg: McMahan et al., arXiv:1602.05629v4, Algorithm 1.

    w <- w + eta * sum_k (n_k / n) (w_k - w)

With eta = 1 this is the weighted mean of the clients' models. n_k is what the run's weighting says:
samples in the paper.
"""

from fedloom.strategies.arithmetic import (
    Vector,
    add,
    blocks,
    constant,
    flush,
    flushed,
    multiply,
)
from fedloom.strategies.rule import Algorithm, Rule, ServerState
from fedloom.terms import LocalTraining, Strategy


def federated_averaging(server_learning_rate: float = 1.0) -> Algorithm:
    """Return FedAvg; float32 arithmetic, value by value, so that every machine gets equal bits."""
    rate = constant(server_learning_rate)

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        del count
        step(state.theta, mean_update, rate)
        return ServerState(mean_update, state.rounds + 1)

    return Algorithm(apply)


def step(theta: Vector, movement: Vector, rate: Vector) -> None:
    """movement <- theta + rate * movement, in place; `rate` is (1,)."""
    for block in blocks(len(movement)):
        moved = movement[block]
        flush(moved)
        multiply(moved, rate)
        add(moved, flushed(theta[block]))


def _algorithm(terms: LocalTraining) -> Algorithm:
    return federated_averaging(terms.server_learning_rate)


RULE = Rule(Strategy.FED_AVG, "FedAvg", "arXiv:1602.05629v4, Algorithm 1", _algorithm)
