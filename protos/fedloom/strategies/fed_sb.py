"""Fed-SB: Singhal et al., arXiv:2502.15436, on LoRA-SB, Ponkshe et al., arXiv:2411.19557.

An adapter is W + s B R A, where B (out, r) and A (r, in) are frozen constants of the plan and R
(r, r) is trained:

    R <- sum_k p_k R_k          hence sum_k p_k B R_k A = B R A, exactly

An update has r^2 values for each product, whatever its extents. What B and A are, and that R begins
with zero, is the plan's (`plan build --lora sb`). Deviation: heads and weights are trained and
averaged as well. A plan with R has nothing else of an adapter in theta: there `fedit` and `ffa` do
the same.
"""

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.parts import Fate
from fedloom.terms import LoraRule


def _fate_of(role: Role, rounds: int) -> Fate:
    del rounds
    return Fate.FROZEN if role in (Role.LORA_A, Role.LORA_B) else Fate.SHARED


RULE = FactorRule(
    LoraRule.FED_SB,
    "Fed-SB",
    "arXiv:2502.15436",
    "R of B R A",
    "exact",
    _fate_of,
    frozenset((Role.LORA_R,)),
)
