"""FLoRA: Wang et al., arXiv:2409.05976, Algorithm 1. The factors are stacked, not averaged.

    W <- W + s [p_1 B_1 ... p_K B_K] [A_1; ...; A_K]          A <- fresh, B <- 0

The product of the stacks is sum_k p_k B_k A_k: the devices' models averaged exactly, at any rank.
The paper sends the stacks to the devices, which add their product to their weights. Here what comes
down is the product, added to a residual beside the frozen W: the stacks of K devices have
K r (out + in) values, and out x in are fewer from K r ~ out/2 on for square matrices; what matters
more is that all devices get equal bits without multiplying anything themselves.

A is drawn as LoRA draws it, uniformly within 1/sqrt(in), from the run's seed and the round.
"""

import numpy as np

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule, Pair, TrainedPairs, both_shared
from fedloom.terms import LoraRule


def fresh_pair(trained: TrainedPairs) -> Pair:
    """Return B = 0 and an A that is drawn anew."""
    b, a = trained.read(0)
    bound = 1 / np.sqrt(a.shape[1])
    return np.zeros_like(b), np.random.default_rng(trained.seed).uniform(-bound, bound, a.shape)


RULE = FactorRule(
    LoraRule.FLORA,
    "FLoRA",
    "arXiv:2409.05976",
    "A and B",
    "exact, in the residual",
    both_shared,
    frozenset((Role.LORA_A, Role.LORA_B, Role.RESIDUAL)),
    fresh_pair,
    has_residual=True,
)
