"""FedIT: Zhang et al., arXiv:2305.05644. Both factors are trained and averaged.

    A <- sum_k p_k A_k          B <- sum_k p_k B_k

The mean of the products, sum_k p_k B_k A_k, is not the product of these means: cross terms remain.
"""

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.parts import Fate
from fedloom.terms import LoraRule


def _fate_of(role: Role, rounds: int) -> Fate:
    del role, rounds
    return Fate.SHARED


RULE = FactorRule(LoraRule.FEDIT, "FedIT", "arXiv:2305.05644", "A and B", "inexact", _fate_of)
