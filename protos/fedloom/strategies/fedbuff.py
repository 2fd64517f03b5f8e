"""FedBuff: Nguyen et al., arXiv:2106.06639, Algorithm 1.

The server's step is FedAvg's, over the K updates that are ready first:

    w <- w + eta_g (1/K) sum_i s(tau_i) Delta_i

where Delta_i was made from a state tau_i steps older. The divisor does not count s: an update that
is late moves the model less, and no other one more. K is `[asynchronous] buffer` of the run file.
Deviations: a device holds its update until a cohort takes it, instead of sending it at once; the
mean is by the run's weighting, of which `uniform` is the paper's; and updates that are too late are
not sent at all.
"""

import numpy as np

from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.fedavg import federated_averaging
from fedloom.strategies.rule import Algorithm, Rule, ServerState
from fedloom.strategies.staleness import staleness_factor
from fedloom.terms import LocalTraining, Strategy


def _algorithm(terms: LocalTraining) -> Algorithm:
    server = federated_averaging(terms.server_learning_rate)

    def joined(state: ServerState, held: Vector, staleness: int) -> Vector:
        del state
        scaled: Vector = held * np.float32(staleness_factor(terms, staleness))
        return scaled

    return Algorithm(server.apply, joined=joined)


RULE = Rule(
    Strategy.FED_BUFF,
    "FedBuff",
    "arXiv:2106.06639, Algorithm 1",
    _algorithm,
    needs="a movement, scaled by its staleness",
)
