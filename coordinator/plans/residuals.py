"""A residual beside every frozen weight that LoRA adapts: W becomes W + R, R zero at first.

Rules such as FLoRA and FedEx-LoRA move R at the server (`fedloom.strategies`). No device trains it:
the graphs add it and give no gradient for it.
"""

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.utils import parametrize

_OWN = ".parametrizations.weight.0.residual"
_FROZEN = ".parametrizations.weight.original"
_BASE_LAYER = ".base_layer"


class Residual(torch.nn.Module):
    """What is added to a weight: (out, in), however the layer keeps its own."""

    def __init__(self, weight: torch.Tensor, transposed: bool) -> None:
        super().__init__()
        shape = weight.shape[::-1] if transposed else weight.shape
        self.residual = torch.nn.Parameter(torch.zeros(shape))
        self._transposed = transposed

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + R."""
        return weight + (self.residual.t() if self._transposed else self.residual)


def add_residuals(network: torch.nn.Module) -> None:
    """Give the weight of every layer that LoRA adapts a residual."""
    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        base = cast("Any", layer.get_base_layer())
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
        parametrize.register_parametrization(base, "weight", Residual(base.weight, transposed))


def is_residual(name: str) -> bool:
    """Tell whether a parameter of PEFT's model is a residual."""
    return name.endswith(_OWN)


def residual_name(name: str) -> str:
    """Return the name of a residual beside those that PEFT gives A and B in a saved adapter."""
    return name.removesuffix(_BASE_LAYER + _OWN) + ".residual.weight"


def frozen_name(name: str) -> str:
    """Return a frozen parameter's name without the residual that it has got."""
    return name.removesuffix(_FROZEN) + ".weight" if name.endswith(_FROZEN) else name
