"""What a LoRA rule is: which of the factors of W + s B A a round trains and which it sends."""

from dataclasses import dataclass

from fedloom.plans import Role
from fedloom.strategies.parts import FateOf
from fedloom.terms import LoraRule


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
