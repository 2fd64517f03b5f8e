"""SCAFFOLD: Karimireddy et al., arXiv:1910.06378v4, Algorithm 1, option II.

c estimates the gradient of the objective, c_i that of client i's; a client corrects its drift by
the difference, and replaces c_i by the mean gradient of its K steps:

    y_i <- y_i - eta_l (g_i(y_i) + c - c_i)                 K times from y_i = x
    c_i+ = c_i - c + (x - y_i) / (K eta_l)
    x <- x + eta_g mean_S(y_i - x)
    c <- c + |S| / N mean_S(c_i+ - c_i)

A client sends y_i - x, then c_i+ - c_i times the terms' `auxiliary_scale`. c and c_i begin with 0.
A client keeps c_i+ once its update is in a stored sum. N is the terms' `population`. K is effective
steps (`fedloom.schedules`), so that momentum and a schedule keep c_i+ a mean of gradients.
Deviation: c follows from sums that are rounded to the grid of the protection, c_i does not, so c is
the mean of the c_i up to that rounding, which is unbiased.
"""

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import (
    Vector,
    add,
    blocks,
    constant,
    flush,
    multiply,
)
from fedloom.strategies.fedavg import step
from fedloom.strategies.rule import (
    MOVEMENT,
    Algorithm,
    Memory,
    Rule,
    Segment,
    Sent,
    ServerState,
    zeros,
)
from fedloom.terms import LocalTraining, Strategy


def _algorithm(terms: LocalTraining) -> Algorithm:
    scale, rate = terms.auxiliary_scale, constant(terms.server_learning_rate)

    def init(theta: Theta) -> ServerState:
        return ServerState(theta, vectors=(zeros(theta),))

    def linear(state: ServerState, memory: Memory) -> Vector:
        (c,), (c_i,) = state.vectors, memory
        return c - c_i

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        (c,), (c_i,), size = state.vectors, memory, len(delta)
        values = np.empty(2 * size, np.float32)
        values[:size] = delta
        change = values[size:]  # -c - (y_i - x) / (K eta_l)
        np.divide(delta, np.float32(-steps * terms.learning_rate), out=change)
        change -= c
        memory = (c_i + change,)
        change *= np.float32(scale)
        return Sent(values, memory)

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        movement, change = np.split(mean_update, 2)
        step(state.theta, movement, rate)
        share = constant(count / (terms.population * scale))
        for block in blocks(len(change)):
            flush(change[block])
            multiply(change[block], share)
            add(change[block], state.vectors[0][block])
        return ServerState(movement, state.rounds + 1, (change,))

    return Algorithm(apply, init, linear, sent)


RULE = Rule(
    Strategy.SCAFFOLD,
    "SCAFFOLD",
    "arXiv:1910.06378v4, Algorithm 1, option II",
    _algorithm,
    needs="a movement and a control variate's change; SGD; equal weights; the population",
    sends=(MOVEMENT, Segment("control variate's change")),
    keeps=("control variate",),
    remembers=("control variate",),
)
