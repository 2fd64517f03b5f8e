"""HetLoRA: Cho et al., arXiv:2401.06432, section 3. A rank for each device, one model for all.

    truncate    A_k = A[:r_k], B_k = B[:, :r_k]           what device k of rank r_k <= r trains
    penalty     F_k + lambda |B_k[:, g:]| |A_k[g:]|       g = floor(gamma r_k)
    prune       r_k <- g where training has made |B_k[:, g:]| |A_k[g:]| smaller than it was
    aggregate   B <- sum_k p_k pad(B_k)                   p_k = |B_k A_k| / sum_j |B_j A_j|
                A <- sum_k p_k pad(A_k)

r is the plan's rank; pad fills up with zeros; norms are Frobenius'. A device sends the movement

    u_k = pad(theta_k) - theta,  hence  theta + sum_k p_k u_k = sum_k p_k pad(theta_k)

since the p_k add up to 1: FedAvg's step with rate 1 is the paper's, whatever protects the sum. A
truncated adapter has no gradient beyond its rank (each factor is multiplied by the other's zeros),
so what is padded needs no mask while it is trained, under any optimiser.

p_k are the weights that the protections hide and add up (`Weighting.FACTOR_NORM`): the norm in
units of 2^-16, rounded to 1 .. 2^24. So p_k is off by 2^-17 / norm of itself, 0.08 % at a norm of
0.01; norms above 256 count as 256, and an adapter that is still zero as one unit. The weight's
class, ceil(log2), is told as every weight's is: under `sealed` it is all that is learnt of a norm.

Beyond r_k, u_k is -theta: as large as the adapter itself, which no number of steps bounds. So the
clip is stated. What exceeds it saturates (and is counted): these ranks then shrink more slowly.

Rank: an update has all U values whatever the rank, and zeros are encrypted like others. Under
`masked`, `encrypted` and `sealed` nobody but the device learns r_k, beyond what sums and classes
tell of it; under `plain` the coordinator can read it off the update. Nor does a rank make an update
smaller or a step cheaper here: graphs and files have rank r. It says what of the model a device's
data can move.

Deviations: a device has one rank, and one weight, for all products: the penalty and what it is
compared by are sums over them, the norm is that of all B_k A_k together. Heads and other weights
are averaged with the same p_k. B begins with zero, so that no rank is pruned in a first round.
"""

import math

import numpy as np

from fedloom.adapters import Theta
from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.parts import Fate, Layout
from fedloom.strategies.tails import Tail, pairs_of
from fedloom.terms import LoraRule


def _fate_of(role: Role, rounds: int) -> Fate:
    del role, rounds
    return Fate.SHARED


RULE = FactorRule(
    LoraRule.HETLORA,
    "HetLoRA",
    "arXiv:2401.06432",
    "A and B, each device up to its own rank",
    "inexact",
    _fate_of,
    frozenset((Role.LORA_A, Role.LORA_B)),
)


def rank_of(layout: Layout) -> int:
    """Return r: the largest rank of a product."""
    return max(pair.rank for pair in pairs_of(layout))


def truncated(layout: Layout, theta: Theta, rank: int) -> Theta:
    """Return a copy of theta with zeros beyond the first `rank` ranks of every product."""
    found = theta.copy()
    for pair in pairs_of(layout):
        pair.a(found)[rank:] = 0
        pair.b(found)[:, rank:] = 0
    return found


def pruned_rank(rank: int, decay: float) -> int:
    """Return floor(decay * rank), 1 at least."""
    return max(1, math.floor(decay * rank))


def tails_of(layout: Layout, rank: int, decay: float) -> tuple[Tail, ...]:
    """Return the ranks that a device of this rank may prune; none without a decay."""
    first = pruned_rank(rank, decay)
    if not decay or first >= rank:
        return ()
    pairs = pairs_of(layout)
    return tuple(Tail(pair, first, rank) for pair in pairs if pair.rank > first)


def factor_norm(layout: Layout, theta: Theta) -> float:
    """Return the Frobenius norm of all products B A together, in float64.

    |B A|^2 = <B^T B, A A^T>: products of (rank, rank), never of (out, in).
    """
    squares = 0.0
    for pair in pairs_of(layout):
        a, b = pair.a(theta).astype(np.float64), pair.b(theta).astype(np.float64)
        squares += float(np.sum((b.T @ b) * (a @ a.T)))
    return math.sqrt(max(squares, 0.0))
