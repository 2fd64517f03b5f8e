"""RFA: Pillutla, Kakade, Harchaoui, arXiv:1912.13445, the smoothed Weiszfeld algorithm.

    z = argmin sum_k alpha_k |z - x_k|
    beta_k <- alpha_k / max(nu, |z - x_k|)          z <- sum_k beta_k x_k / sum_k beta_k

alpha_k are the shares of the weights. Whatever updates of less than half of the weight are, z stays
near the others. Every iterate is a mean of the updates, so that only its K shares are kept, and an
iteration reads the updates once. It ends when z moves by less than 1e-7 of the middle distance.

Deviations: it starts from the coordinate-wise median. From the mean, which one huge update moves as
far as it likes, that update would lose no more than a factor K of its share in each iteration. And
nu begins at the middle distance and shrinks to its value by a factor of 4: at an update, as the
median may be, the iteration would stand still from the start.
"""

from collections.abc import Iterator

import numpy as np

from coordinator.aggregation import Aggregation, Rule
from coordinator.strategies.robust.updates import Numbers, RobustRule, Updates, combined

_ENOUGH = 1e-7  # of the middle one of the distances
_SHRINKING = 0.25  # of nu, from one iteration to the next


def _from_median(updates: Updates) -> Numbers:
    """Return the distances from the coordinate-wise median, (K,)."""
    squares = np.zeros(updates.count)
    for block in updates.blocks():
        block -= np.median(block, axis=0)
        squares += np.einsum("kn,kn->k", block, block)
    return np.sqrt(squares)


def _from_mean(updates: Updates, shares: Numbers, before: Numbers) -> tuple[Numbers, float]:
    """Return the distances from sum_k share_k x_k, (K,), and how far that is from the one before.

    Both follow from one reading of the updates.
    """
    squares, moved = np.zeros(updates.count), 0.0
    for block in updates.blocks():
        moved += float(np.square((shares - before) @ block).sum())
        block -= shares @ block
        squares += np.einsum("kn,kn->k", block, block)
    return np.sqrt(squares), float(np.sqrt(moved))


def _middle(distances: Numbers, alpha: Numbers) -> float:
    """Return the least distance within which more than half of the weight lies."""
    order = np.argsort(distances)
    within = np.cumsum(alpha[order])
    return float(
        distances[order][np.searchsorted(within, 0.5, side="right").clip(max=len(order) - 1)]
    )


def _combine(updates: Updates, aggregation: Aggregation) -> Iterator[Numbers]:
    alpha, shares = updates.shares, np.zeros(updates.count)
    distances = _from_median(updates)
    nu = _middle(distances, alpha)
    for _ in range(aggregation.iterations):
        nu = max(aggregation.smoothing, nu)
        beta = alpha / np.maximum(nu, distances)
        before, shares = shares, beta / beta.sum()
        distances, moved = _from_mean(updates, shares, before)
        settled = before.any() and nu == aggregation.smoothing
        if settled and moved <= _ENOUGH * np.median(distances):
            break
        nu *= _SHRINKING
    return combined(updates, shares)


RULE = RobustRule(
    Rule.GEOMETRIC_MEDIAN,
    "RFA, geometric median",
    "arXiv:1912.13445",
    "less than half of the weight",
    weighs=True,
    reads="`iterations` + 2 times at most",
    combine=_combine,
)
