"""FedSA-LoRA: Guo et al., arXiv:2410.01463 Both are trained, A alone is averaged.

    A <- sum_k p_k A_k          B_k stays on device k

A learns what is common to all, B what is one device's own. A device's model is A with its own B.
"""

from fedloom.plans import Role
from fedloom.strategies.factors import FactorRule
from fedloom.strategies.parts import Fate
from fedloom.terms import LoraRule


def _fate_of(role: Role, rounds: int) -> Fate:
    del rounds
    return Fate.PRIVATE if role is Role.LORA_B else Fate.SHARED


RULE = FactorRule(
    LoraRule.FEDSA,
    "FedSA-LoRA",
    "arXiv:2410.01463",
    "A",
    "of A alone",
    _fate_of,
    frozenset((Role.LORA_A, Role.LORA_B)),
)
