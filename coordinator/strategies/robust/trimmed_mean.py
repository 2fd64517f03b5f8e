"""Coordinate-wise trimmed mean: Yin et al., arXiv:1803.01498, Definition 2, option II.

    g_j = 1 / (m - 2b) sum { x_k,j without the b largest and the b smallest },   b = floor(beta m)

The paper states it for beta m whole. At most b updates, whatever they are, leave each value between
those of the others. Weights do not count: they are stated by agents.
"""

import math
from collections.abc import Iterator

from coordinator.aggregation import Aggregation, Rule
from coordinator.strategies.robust.updates import Numbers, RobustRule, Updates


def _combine(updates: Updates, aggregation: Aggregation) -> Iterator[Numbers]:
    # A little more, so that 0.1 of 10, say, is not rounded below 1.
    cut = math.floor(aggregation.trim * updates.count * (1 + 1e-12))
    for block in updates.blocks():
        if cut:
            block.partition((cut, updates.count - cut - 1), axis=0)
        yield block[cut : updates.count - cut].mean(axis=0)


RULE = RobustRule(
    Rule.TRIMMED_MEAN,
    "coordinate-wise trimmed mean",
    "arXiv:1803.01498, Definition 2",
    "`trim` n, rounded down",
    weighs=False,
    reads="once",
    combine=_combine,
)
