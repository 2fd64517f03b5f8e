"""FedAvgM: Hsu, Qi, Brown, arXiv:1909.06335v1, section 3.2 (server momentum).

    v <- beta v + sum_k (n_k / n) Delta w_k
    w <- w - v

with Delta w_k = w - w_k in the paper and -Delta w_k, the movement, here; the server's learning rate
eta, 1 in the paper, multiplies v in the second line.
"""

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import (
    Vector,
    add,
    blocks,
    constant,
    flush,
    flushed,
    multiply,
)
from fedloom.strategies.rule import Algorithm, Rule, ServerState, zeros
from fedloom.terms import LocalTraining, Strategy


def _algorithm(terms: LocalTraining) -> Algorithm:
    beta, rate = constant(terms.server_momentum), constant(terms.server_learning_rate)

    def init(theta: Theta) -> ServerState:
        return ServerState(theta, vectors=(zeros(theta),))

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        del count
        velocity = state.vectors[0].copy()
        for block in blocks(len(mean_update)):
            v, moved = velocity[block], mean_update[block]
            flush(moved)
            multiply(v, beta)
            add(v, moved)
            moved[:] = v
            multiply(moved, rate)
            add(moved, flushed(state.theta[block]))
        return ServerState(mean_update, state.rounds + 1, (velocity,))

    return Algorithm(apply, init)


RULE = Rule(
    Strategy.FED_AVG_M,
    "FedAvgM",
    "arXiv:1909.06335v1, section 3.2",
    _algorithm,
    keeps=("velocity",),
)
