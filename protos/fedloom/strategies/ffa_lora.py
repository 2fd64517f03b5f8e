"""FFA-LoRA: Sun et al., arXiv:2403.12313 A stays as it was drawn, B is trained.

    B <- sum_k p_k B_k          hence sum_k p_k B_k A = B A, exactly

Half of the adapter travels. A plan that was built with A frozen has no A in theta: there the rule
has nothing left to do. Deviation: heads and weights are trained and averaged as well.
"""

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.parts import Fate
from fedloom.terms import LoraRule


def _fate_of(role: Role, rounds: int) -> Fate:
    del rounds
    return Fate.FROZEN if role is Role.LORA_A else Fate.SHARED


RULE = FactorRule(LoraRule.FFA, "FFA-LoRA", "arXiv:2403.12313", "B", "exact", _fate_of)
