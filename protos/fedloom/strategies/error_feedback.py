"""Error feedback: what an agent did not send waits on the device and is added to its next movement.

Karimireddy, Rebjock, Stich, Jaggi, arXiv:1901.09847v2, Algorithm 2, and Stich, Cordonnier, Jaggi,
arXiv:1809.07599v2, Algorithm 1, with a round's movement in the place of gamma g:

    p_t = movement + e_t;    sent = C(p_t);    e_(t+1) = p_t - sent

so that over the rounds in which an agent takes part, what it has sent and what waits add up to
what it has moved. C chooses places (`random_mask`, `top_k`) and cuts at the cohort's clip: what the
clip cuts off waits too, which is why e is fixed when the update is encoded. Rounding to levels is
without bias and does not come back. e is the last of a device's vectors that is not a model of its
own; it moves with the stored sums, as they do (`edge_agent.local_memory`).

No bound of a round's movement bounds p: a value that has waited for n rounds may hold n movements.
The clip that the terms imply (`fedloom.terms.clip_of`) is that of the first round, in which nothing
waits; later ones follow from the encrypted histogram of what was really sent, and what exceeds one
goes back and is sent later.
"""

import numpy as np

from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.rule import Memory, Places


def added(delta: Vector, memory: Memory) -> Vector:
    """Return p: the movement, which is used up, with what waits where anything does."""
    if memory:
        delta += memory[0]
    return delta


def return_cut(waiting: Vector, places: Places, sent: Vector, clip: float) -> None:
    """Leave in `waiting`, p or already e, at the places that were sent what the clip cuts off.

    May be called again with another clip. `sent` is (k,): p at the places.
    """
    limit = np.float32(clip)
    waiting[places] = sent - np.clip(sent, -limit, limit)
