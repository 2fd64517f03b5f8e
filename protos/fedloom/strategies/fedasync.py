"""FedAsync: Xie, Koyejo, Gupta, arXiv:1903.03934, Algorithm 1.

    x_t <- (1 - alpha_t) x_{t-1} + alpha_t x_new,    alpha_t = alpha s(t - tau)

x_new was trained from x_tau, on the loss with rho/2 |x - x_tau|^2 added; rho is `proximal_mu`. A
device that has x_{t-1} sends alpha_t (x_new - x_{t-1}), which the
server adds: with `[asynchronous] buffer = 1`, which only `plain` allows, this is the algorithm.
Deviation: with a larger buffer the server mixes in the mean of the buffer's models, each with its
alpha, in one step.
"""

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.fedavg import federated_averaging
from fedloom.strategies.rule import Algorithm, Memory, Rule, Sent, ServerState
from fedloom.strategies.staleness import staleness_factor
from fedloom.terms import LocalTraining, Strategy


def _algorithm(terms: LocalTraining) -> Algorithm:
    server = federated_averaging()

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        """Hold x_new: by how much it differs from the state is known when a sum takes it."""
        del memory, steps
        return Sent(np.add(state.theta, delta, out=delta))

    def joined(state: ServerState, held: Vector, staleness: int) -> Vector:
        alpha = terms.mixing * staleness_factor(terms, staleness)
        mixed: Vector = (held - state.theta) * np.float32(alpha)
        return mixed

    return Algorithm(server.apply, sent=sent, joined=joined)


RULE = Rule(
    Strategy.FED_ASYNC,
    "FedAsync",
    "arXiv:1903.03934, Algorithm 1",
    _algorithm,
    needs="its model less the state, times alpha and by its staleness",
)
