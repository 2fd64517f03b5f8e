"""Krum and Multi-Krum: Blanchard et al., NIPS 2017; Krum also in arXiv:1703.02757.

    s(i) = sum { |x_i - x_j|^2 : the n - f - 2 nearest x_j, j != i }

Krum is the x_i of the least score, the first of them in ascending order of slots; Multi-Krum the
mean of the m of least score. Both need n > 2f + 2. Deviation: m is n - f - 2, as many as a score
counts, or fewer; the paper leaves m open up to n. Weights do not count.

Distances are summed from differences, not from products: what is common to all cancels exactly.
That takes K^2/2 passes over a block in memory.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation import Aggregation, Rule
from coordinator.strategies.robust.updates import Numbers, RobustRule, Updates, combined


def _distances(updates: Updates) -> NDArray[np.float64]:
    """Return |x_i - x_j|^2, (K, K)."""
    squares = np.zeros((updates.count, updates.count))
    for block in updates.blocks():
        for i in range(updates.count - 1):
            differences = block[i + 1 :] - block[i]
            squares[i, i + 1 :] += np.einsum("kn,kn->k", differences, differences)
    return squares + squares.T


def _ranked(updates: Updates, faulty: int) -> NDArray[np.intp]:
    """Return the updates' places, those of least score first."""
    squares = _distances(updates)
    np.fill_diagonal(squares, np.inf)
    squares.sort(axis=1)
    scores = squares[:, : updates.count - faulty - 2].sum(axis=1)
    return np.argsort(scores, kind="stable")


def _average(updates: Updates, chosen: NDArray[np.intp]) -> Iterator[Numbers]:
    shares = np.zeros(updates.count)
    shares[chosen] = 1 / len(chosen)
    return combined(updates, shares)


def _krum(updates: Updates, aggregation: Aggregation) -> Iterator[Numbers]:
    return _average(updates, _ranked(updates, aggregation.faulty)[:1])


def _multi_krum(updates: Updates, aggregation: Aggregation) -> Iterator[Numbers]:
    count = aggregation.selected or updates.count - aggregation.faulty - 2
    return _average(updates, _ranked(updates, aggregation.faulty)[:count])


KRUM = RobustRule(
    Rule.KRUM,
    "Krum",
    "arXiv:1703.02757",
    "`faulty`, fewer than n/2 - 1",
    weighs=False,
    reads="twice",
    combine=_krum,
)
MULTI_KRUM = RobustRule(
    Rule.MULTI_KRUM,
    "Multi-Krum",
    "Blanchard et al., NIPS 2017",
    "`faulty`, fewer than n/2 - 1",
    weighs=False,
    reads="twice",
    combine=_multi_krum,
)
