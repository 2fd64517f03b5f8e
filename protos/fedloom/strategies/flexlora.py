"""FlexLoRA: Bai et al., arXiv:2402.11505. The mean of the products, cut to rank r by its SVD.

    W = sum_k p_k B_k A_k = U S V^T          B <- U_r S_r          A <- V_r^T

B A is the product of rank r that is nearest to W (Eckart and Young), and its first rows and columns
the nearest of any lower rank: a device of lower rank takes these. Rows of A beyond a device's own
rank are zero in what it sends, and count so.

The product alone is the paper's concern. How S is divided is a choice here: the rows of A stay of
length 1, about LoRA's own start, and a direction that S leaves out has B = 0 with an A that is not,
as at the start. With sqrt(S) in both factors it would have no gradient, in this and all rounds.
"""

import numpy as np

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule, Matrix, Pair, TrainedPairs, both_shared
from fedloom.terms import LoraRule


def nearest_pair(trained: TrainedPairs) -> Pair:
    """Return B (out, r) and A (r, in) of the nearest product to the mean of the products.

    While the devices' ranks add up to less than the matrix has, only the factors are stacked and
    decomposed; else the matrix is. No more than about three of its size are in memory.
    """
    b, a = trained.read(0)
    rank, limit = a.shape[0], min(b.shape[0], a.shape[1])
    stacked = rank * len(trained.shares) <= limit
    u, s, v = _stacked(trained) if stacked else _decomposed(trained.mean_product())
    kept = min(rank, limit)
    new_b, new_a = np.zeros_like(b), np.zeros_like(a)
    new_b[:, :kept] = u[:, :kept] * s[:kept]
    new_a[:kept] = v[:kept]
    return new_b, new_a


def _decomposed(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _stacked(trained: TrainedPairs) -> tuple[Matrix, Matrix, Matrix]:
    """W = [p_1 B_1 ...] [A_1; ...] = Q_b (R_b R_a^T) Q_a^T: what is decomposed is K r x K r."""
    pairs = [(share * b, a) for share, b, a in trained]
    q_b, r_b = np.linalg.qr(np.concatenate([b for b, _ in pairs], axis=1))
    q_a, r_a = np.linalg.qr(np.concatenate([a for _, a in pairs]).T)
    u, s, v = _decomposed(r_b @ r_a.T)
    return q_b @ u, s, v @ q_a.T


RULE = FactorRule(
    LoraRule.FLEXLORA,
    "FlexLoRA",
    "arXiv:2402.11505",
    "A and B",
    "nearest of rank r",
    both_shared,
    frozenset((Role.LORA_A, Role.LORA_B)),
    nearest_pair,
)
