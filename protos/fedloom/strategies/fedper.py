"""FedPer: Arivazhagan et al., arXiv:1912.00818. The head is a device's own.

base <- sum_k p_k base_k          head_k stays on device k; both are trained together
"""

from fedloom.plans import Role
from fedloom.strategies.parts import Fate, FateOf


def with_own_head(fate_of: FateOf) -> FateOf:
    """Return the fates of these parts when the head stays on the device."""

    def own(role: Role, rounds: int) -> Fate:
        return Fate.PRIVATE if role is Role.HEAD else fate_of(role, rounds)

    return own
