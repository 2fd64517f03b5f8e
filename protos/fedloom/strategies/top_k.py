"""Top-k: every agent sends the values that are largest, and where they are.

Stich, Cordonnier, Jaggi, arXiv:1809.07599v2, Definition 2.1 (top_k), and Aji and Heafield,
arXiv:1704.05021, who send the largest by magnitude as here. The choice tells the reader which
values moved most, and differs from agent to agent: `plain` alone adds such updates. What the
algorithm and the server see is a whole update in which the rest is 0: the mean of all agents'
choices.
"""

import numpy as np

from fedloom.adapters import Theta
from fedloom.compression import chosen_count
from fedloom.strategies.error_feedback import added
from fedloom.strategies.rule import Algorithm, Memory, Sent, ServerState
from fedloom.terms import LocalTraining


def largest_alone(inner: Algorithm, terms: LocalTraining) -> Algorithm:
    """Return the algorithm of a movement alone, of which each agent sends its largest values."""

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        del state, steps
        waiting = added(delta, memory)
        count = chosen_count(terms.compression_share, len(waiting))
        chosen = np.argpartition(np.abs(waiting), len(waiting) - count)[len(waiting) - count :]
        values = np.zeros_like(waiting)
        values[chosen] = waiting[chosen]
        if not memory:
            return Sent(values)
        waiting[chosen] = 0
        return Sent(values, (waiting,))

    return Algorithm(inner.apply, inner.init, inner.linear, sent)
