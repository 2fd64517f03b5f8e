"""RoLoRA: Chen et al., arXiv:2502.01755v3. One factor at a time, by turns.

    odd rounds    A is frozen,    B <- sum_k p_k B_k
    even rounds   B is frozen,    A <- sum_k p_k A_k

Each round's mean is exact, as in FFA-LoRA, and A is learnt as well. Rounds are counted as they are
applied, from 1: a void one is no turn. Deviation: heads and weights are trained in every round.
"""

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.parts import Fate
from fedloom.terms import LoraRule


def _fate_of(role: Role, rounds: int) -> Fate:
    frozen = Role.LORA_B if rounds % 2 else Role.LORA_A
    return Fate.FROZEN if role is frozen else Fate.SHARED


RULE = FactorRule(
    LoraRule.ROLORA,
    "RoLoRA",
    "arXiv:2502.01755v3",
    "B and A by turns",
    "exact",
    _fate_of,
    frozenset((Role.LORA_A, Role.LORA_B)),
)
