"""Norm bounding: Sun et al., arXiv:1911.07963, norm thresholding of updates.

    w <- w + sum_k p_k Delta_k / max(1, |Delta_k|_2 / M)

A faulty update counts no more than its share p_k of a step of length M, in whatever direction. The
paper's Gaussian noise is not added.
"""

from collections.abc import Iterator

import numpy as np

from coordinator.aggregation import Aggregation, Rule
from coordinator.strategies.robust.updates import Numbers, RobustRule, Updates, combined


def _combine(updates: Updates, aggregation: Aggregation) -> Iterator[Numbers]:
    squares = np.zeros(updates.count)
    for block in updates.blocks():
        squares += np.einsum("kn,kn->k", block, block)
    factors = 1 / np.maximum(1, np.sqrt(squares) / aggregation.bound)
    return combined(updates, updates.shares * factors)


RULE = RobustRule(
    Rule.NORM_BOUND,
    "norm bounding",
    "arXiv:1911.07963",
    "any, each as a step of `bound`",
    weighs=True,
    reads="twice",
    combine=_combine,
)
