"""A LoRA rule: which of the factors of W + s B A a round trains and sends, and what follows.

Most rules are content with the mean of what is sent. Three need every device's factors: they give
new ones in the place of the mean, and may add to the weight's residual what these leave out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.plans import Role
from fedloom.strategies.parts import Fate, FateOf
from fedloom.terms import LoraRule

Matrix = NDArray[np.float64]
Pair = tuple[Matrix, Matrix]  # B (out, r) and A (r, in)


@dataclass(frozen=True)
class TrainedPairs:
    """One target's factors as a cohort trained them: they are read anew in every pass.

    `shares` (K,) are p_k, which sum to 1; `read(k)` gives B_k and A_k; of different `seed` is what
    a rule draws in each round and for each target.
    """

    shares: Matrix
    read: Callable[[int], Pair]
    seed: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[tuple[float, Matrix, Matrix]]:
        """Yield p_k, B_k and A_k of each device."""
        for index, share in enumerate(self.shares):
            yield float(share), *self.read(index)

    def mean_product(self) -> Matrix:
        """Return sum_k p_k B_k A_k, (out, in): no more than two such matrices are in memory."""
        total: Matrix | None = None
        for share, b, a in self:
            product = (share * b) @ a
            if total is None:
                total = product
            else:
                total += product
        if total is None:
            raise ValueError("expected the factors of one device at least")
        return total


@dataclass(frozen=True)
class FactorRule:
    """A LoRA rule as a run file names it; `fate_of` is asked for LORA_A and LORA_B alone."""

    lora: LoraRule
    name: str
    paper: str
    sends: str  # in words, for the table
    mean: str  # what the mean of the factors is to that of the products, for the table
    fate_of: FateOf
    needs: frozenset[Role] = frozenset()  # roles that the layout must have
    new_pair: Callable[[TrainedPairs], Pair] | None = None  # None: the mean of what is sent
    has_residual: bool = False  # what the new pair lacks of the mean product goes there


def both_shared(role: Role, rounds: int) -> Fate:
    """Have both factors trained and sent in every round."""
    del role, rounds
    return Fate.SHARED
