"""FedProx: Li et al., arXiv:1812.06127v5, Algorithm 2.

The server's step is FedAvg's. Each client minimises

    h_k(w; w_t) = F_k(w) + mu/2 |w - w_t|^2,

that is, adds mu (w - w_t) to its gradient. Deviations: clients make the number of steps that the
terms state instead of solving to gamma-inexactness, and n_k weighs them in the mean (the paper
samples clients with probability n_k / n and averages without weights).
"""

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.fedavg import federated_averaging
from fedloom.strategies.rule import Algorithm, Rule
from fedloom.terms import LocalTraining, Strategy


def proximal_gradient(gradient: Theta, theta: Theta, theta_global: Theta, mu: float) -> None:
    """Add mu (theta - theta_global) to `gradient` in place; nothing when mu is 0."""
    if mu:
        gradient += np.float32(mu) * (theta - theta_global)


def _algorithm(terms: LocalTraining) -> Algorithm:
    return federated_averaging(terms.server_learning_rate)


RULE = Rule(
    Strategy.FED_PROX,
    "FedProx",
    "arXiv:1812.06127v5, Algorithm 2",
    _algorithm,
    needs="a movement, under a proximal term",
)
