"""Rules across the means of a round's groups: Velicheti and Koyejo, arXiv:2110.02940 (SHARE).

A round's members fall into G random groups; each group's mean is opened, none of its updates. Then

    median             Yin et al., arXiv:1803.01498, Definition 1: of each value, or the mean of the
                       middle two
    trimmed mean       the same, Definition 2: the mean of each value without the b largest and the
                       b smallest, b = floor(trim G)
    geometric median   Pillutla et al., arXiv:1912.13445, Algorithm 2 with equal weights: from the
                       coordinate-wise median, at most 32 times z <- sum_g beta_g x_g / sum beta,
                       beta_g = 1 / max(nu, |z - x_g|), where nu shrinks by a factor of 4
                       from the middle one of the first distances to 1e-6

What it promises: while fewer than half of the groups hold a faulty member (at most b of them with a
trimmed mean), the result stays within what the other groups' means are: between them, value by
value, or near them. What it does not: one faulty member in each of half of the groups decides, so f
faulty members need G > 2f; a group of which one member is faulty is lost with the others in it; and
means of groups differ less than updates do, so that what a few do a little wrong is not seen.

Deviations: SHARE clusters anew several times in a round and averages the results; here a group is
drawn once in an attempt, since each update is given once. nu does not begin small, since the median
may be a group's mean, where the iteration would stand still from the start. Every agent computes
the same bits (`arithmetic`): additions are of float64 in a fixed order, value by value, rounded
once; those over all values, of which a distance is made, end in an exact one.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedloom.strategies.arithmetic import Vector, blocks, flush, flushed
from fedloom.terms import GroupRule, LocalTraining

ITERATIONS, SMOOTHING, SHRINKING = 32, 1e-6, 0.25
_LANES = 1 << 14  # of `blocks`


def combined(terms: LocalTraining, means: Sequence[Vector]) -> Vector:
    """Return what the terms' rule makes of the groups' means, (U,) float32 each."""
    match terms.group_rule:
        case GroupRule.MEDIAN:
            return _trimmed(means, (len(means) - 1) // 2)
        case GroupRule.TRIMMED_MEAN:
            return _trimmed(means, math.floor(terms.group_trim * len(means)))
        case GroupRule.GEOMETRIC_MEDIAN:
            return _geometric_median(means)


def _trimmed(means: Sequence[Vector], cut: int) -> Vector:
    """Return the mean of each value's middle ones; of one or two of them this is the median."""
    result = np.empty_like(means[0])
    for block in blocks(len(result)):
        values = np.stack([flushed(mean[block]) for mean in means])
        values.sort(axis=0)
        kept = values[cut : len(means) - cut].astype(np.float64)
        result[block] = _rounded(sum(kept[1:], kept[0]) / len(kept))
    return result


def _geometric_median(means: Sequence[Vector]) -> Vector:
    z = _trimmed(means, (len(means) - 1) // 2)
    distances = [_distance(mean, z) for mean in means]
    nu = sorted(distances)[len(means) // 2]
    for _ in range(ITERATIONS):
        nu = max(SMOOTHING, nu)
        before, z = z, _weighted(means, [1 / max(nu, distance) for distance in distances])
        if nu == SMOOTHING and np.array_equal(before, z):
            break
        distances, nu = [_distance(mean, z) for mean in means], nu * SHRINKING
    return z


def _weighted(means: Sequence[Vector], beta: Sequence[float]) -> Vector:
    """Return sum_g beta_g x_g / sum_g beta_g, added in float64 in order of the groups."""
    result, whole = np.empty_like(means[0]), math.fsum(beta)
    for block in blocks(len(result)):
        total = np.zeros(block.stop - block.start)
        for mean, weight in zip(means, beta, strict=True):
            total += flushed(mean[block]).astype(np.float64) * (weight / whole)
        result[block] = _rounded(total)
    return result


def _distance(x: Vector, z: Vector) -> float:
    """Return |x - z|, with the same bits everywhere: no library's order of additions enters it."""
    lanes = np.zeros(_LANES)
    for block in blocks(len(x)):
        difference = flushed(x[block]).astype(np.float64) - flushed(z[block]).astype(np.float64)
        lanes[: len(difference)] += difference * difference
    return math.sqrt(math.fsum(lanes.tolist()))


def _rounded(values: NDArray[np.float64]) -> Vector:
    """Return float32: what is small enough for machines to differ in is zero."""
    rounded = values.astype(np.float32)
    flush(rounded, least_exponent=2)
    return rounded
