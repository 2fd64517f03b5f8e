"""FedNova: Wang et al., arXiv:2007.07481v1, section 5, over the general update of section 4.1.

A client's movement is -eta G_i a_i: its gradients, each as often as the optimiser has added it to
the model. Averaging movements weighs a client by its steps, and the mean converges to the optimum
of another objective. FedNova averages what one step moved, and goes the mean number of steps:

    d_i = G_i a_i / |a_i|_1                     eta d_i = -(movement) / |a_i|_1
    x <- x - tau_eff sum_i p_i eta d_i          tau_eff = sum_i p_i |a_i|_1

p_i is what the run's weighting says, n_i / n in the paper. Both sums are of what each client knows
alone: an update is the movement over |a_i|_1, then |a_i|_1 times the terms' `auxiliary_scale`.
a_i is that of SGD with momentum and a schedule (`fedloom.schedules.effective_steps`). Deviations:
the server's learning rate, 1 in the paper, multiplies tau_eff; there is no server momentum.
"""

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import Vector, constant, flush
from fedloom.strategies.fedavg import step
from fedloom.strategies.rule import MOVEMENT, Algorithm, Memory, Rule, Segment, Sent, ServerState
from fedloom.terms import LocalTraining, Strategy


def _algorithm(terms: LocalTraining) -> Algorithm:
    scale, rate = terms.auxiliary_scale, terms.server_learning_rate

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        del state, memory
        values = np.empty(len(delta) + 1, np.float32)
        np.divide(delta, np.float32(steps), out=values[:-1])
        values[-1] = steps * scale
        return Sent(values)

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        del count
        flush(mean_update[-1:])
        effective = float(mean_update[-1]) / scale
        step(state.theta, mean_update[:-1], constant(rate * effective))
        return ServerState(mean_update[:-1], state.rounds + 1)

    return Algorithm(apply, sent=sent)


RULE = Rule(
    Strategy.FED_NOVA,
    "FedNova",
    "arXiv:2007.07481v1, section 5",
    _algorithm,
    needs="a movement and the number of steps that made it; SGD; a bound on these steps",
    sends=(MOVEMENT, Segment("steps", per_parameter=False)),
)
