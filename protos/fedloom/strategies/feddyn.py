"""FedDyn: Acar et al., arXiv:2111.04263v2, Algorithm 1.

A device minimises L_k(theta) - <g_k, theta> + alpha/2 |theta - theta_t|^2, where g_k is the
gradient of its own loss where it ended last: once devices agree, each stands at a stationary point.

    theta_k = what local training gives for that objective
    g_k <- g_k - alpha (theta_k - theta_t)
    h <- h - alpha / m sum_{k in P} (theta_k - theta_t)
    theta <- mean_P(theta_k) - h / alpha

g_k and h begin with 0. m is the terms' `population`; a device keeps g_k once its update is in a
stored sum. The state holds h / alpha, in which alpha does not appear. Deviation: the terms' number
of steps stands in for the exact minimum.
"""

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import (
    Vector,
    add,
    blocks,
    constant,
    flush,
    flushed,
    multiply,
    subtract,
)
from fedloom.strategies.rule import Algorithm, Memory, Rule, Sent, ServerState, zeros
from fedloom.terms import LocalTraining, Strategy


def _algorithm(terms: LocalTraining) -> Algorithm:
    def init(theta: Theta) -> ServerState:
        return ServerState(theta, vectors=(zeros(theta),))

    def linear(state: ServerState, memory: Memory) -> Vector:
        del state
        return -memory[0]

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        del state, steps
        return Sent(delta, (memory[0] - np.float32(terms.dynamic_alpha) * delta,))

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        share = constant(count / terms.population)
        pull = state.vectors[0].copy()  # h / alpha
        for block in blocks(len(mean_update)):
            moved = mean_update[block]
            flush(moved)
            part = moved.copy()
            multiply(part, share)
            subtract(pull[block], part)
            add(moved, flushed(state.theta[block]))
            subtract(moved, pull[block])
        return ServerState(mean_update, state.rounds + 1, (pull,))

    return Algorithm(apply, init, linear, sent)


RULE = Rule(
    Strategy.FED_DYN,
    "FedDyn",
    "arXiv:2111.04263v2, Algorithm 1",
    _algorithm,
    needs="a movement, under a linear and a proximal term; equal weights; the population",
    keeps=("h / alpha",),
    remembers=("gradient",),
)
