"""FedIT: Zhang et al., arXiv:2305.05644. Both factors are trained and averaged.

    A <- sum_k p_k A_k          B <- sum_k p_k B_k

The mean of the products, sum_k p_k B_k A_k, is not the product of these means: cross terms remain.
"""

from fedloom.strategies.factors import FactorRule, both_shared
from fedloom.terms import LoraRule

RULE = FactorRule(LoraRule.FEDIT, "FedIT", "arXiv:2305.05644", "A and B", "inexact", both_shared)
