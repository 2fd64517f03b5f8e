"""FedEx-LoRA: Singhal et al., arXiv:2410.09432. Both factors are averaged, and what that leaves out
is added to the weight that was frozen.

    B <- sum_k p_k B_k          A <- sum_k p_k A_k
    W <- W + s (sum_k p_k B_k A_k - B A)

So W + s B A is the mean of the devices' models exactly. Here the last term is added to a residual
that stands beside the frozen W in the model, and B A is the product of the float32 values that all
devices end with.
"""

import numpy as np

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule, Pair, TrainedPairs, both_shared
from fedloom.terms import LoraRule


def mean_pair(trained: TrainedPairs) -> Pair:
    """Return the means of both factors."""
    first_b, first_a = trained.read(0)
    b, a = np.zeros_like(first_b), np.zeros_like(first_a)
    for share, one_b, one_a in trained:
        b += share * one_b
        a += share * one_a
    return b, a


RULE = FactorRule(
    LoraRule.FEDEX,
    "FedEx-LoRA",
    "arXiv:2410.09432",
    "A and B",
    "exact, by a residual",
    both_shared,
    frozenset((Role.LORA_A, Role.LORA_B, Role.RESIDUAL)),
    mean_pair,
    has_residual=True,
)
