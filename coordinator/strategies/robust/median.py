"""Coordinate-wise median: Yin et al., arXiv:1803.01498, Definition 1 and Algorithm 1, option I.

    g_j = med { x_k,j : k in [m] }

the middle value, or the mean of the two middle ones. Fewer than half of the updates, whatever they
are, leave each value between those of the others. Weights do not count: they are stated by agents.
"""

from collections.abc import Iterator

import numpy as np

from coordinator.aggregation import Aggregation, Rule
from coordinator.strategies.robust.updates import Numbers, RobustRule, Updates


def _combine(updates: Updates, aggregation: Aggregation) -> Iterator[Numbers]:
    del aggregation
    for block in updates.blocks():
        yield np.median(block, axis=0, overwrite_input=True)


RULE = RobustRule(
    Rule.MEDIAN,
    "coordinate-wise median",
    "arXiv:1803.01498, Definition 1",
    "fewer than n/2",
    weighs=False,
    reads="once",
    combine=_combine,
)
