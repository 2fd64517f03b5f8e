"""FedRep: Collins et al., arXiv:2102.07078. The head is a device's own, and first.

    head_k <- head_k - alpha grad_head f_k(base, head_k)          in the first steps of a round
    base_k <- base_k - alpha grad_base f_k(base_k, head_k)        in the rest of them
    base   <- sum_k p_k base_k

The steps for the head are the terms' `head_steps`, in one optimiser with the rest of the round.
"""

from fedloom.strategies.parts import Parts


def resting(parts: Parts, head_steps: int, step: int) -> tuple[slice, ...]:
    """Return the parts that do not move in a step, from 0, of a round."""
    return parts.resting + (parts.shared if step < head_steps else parts.private)
