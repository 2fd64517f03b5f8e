"""LoRA-SB's adapter, W + s B R A with frozen B and A: Ponkshe et al., arXiv:2411.19557, section 3.

B (out, r) has the first left singular vectors of a matrix as columns, A (r, in) the right ones as
rows, both orthonormal as in LoRA-SB; R (r, r) is trained and begins with zero. The matrix is W
itself, as in LoRA-XS (Balazy et al., arXiv:2405.17604), which needs no data; or, with rows of the
operator's, LoRA-SB's own (`first_gradient`). Deviations: LoRA-SB begins with a step in R; LoRA-XS
has the singular values in one of the factors, and noise in R. Either would make the untrained model
another one than the base.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ConfigError

_ADAPTER = "default"  # PEFT's name for the only one
_BETWEEN = f".lora_B.{_ADAPTER}.between."


class BetweenFactors(torch.nn.Linear):
    """LoRA's B as PEFT calls it, with R before it: x (..., r) -> B R x (..., out)."""

    def __init__(self, outputs: int, rank: int) -> None:
        super().__init__(rank, outputs, bias=False)
        self.between = torch.nn.Linear(rank, rank, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the products."""
        return super().forward(self.between(values))


def put_between(network: Any, rank: int) -> None:
    """Freeze the factors of PEFT's model at singular vectors, and give each pair an R of zeros."""
    for name, module in network.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module.get_base_layer()
        weight = layer.weight.detach()
        if rank > min(weight.shape):
            raise ConfigError(
                "rank",
                f"expected at most {min(weight.shape)} with lora = sb, the singular vectors of "
                f"{name}, found {rank}",
            )
        trained: Any = module.lora_B[_ADAPTER]
        between = BetweenFactors(trained.out_features, rank)
        torch.nn.init.zeros_(between.between.weight)
        between.weight.requires_grad_(False)
        module.lora_B[_ADAPTER] = between
        set_factors(module, weight)


def set_factors(module: LoraLayer, matrix: torch.Tensor) -> None:
    """Freeze a layer's A and B at the singular vectors of a matrix that is shaped as its weight."""
    a: Any = module.lora_A[_ADAPTER]
    b: Any = module.lora_B[_ADAPTER]
    if isinstance(module.get_base_layer(), Conv1D):  # keeps it the other way round
        matrix = matrix.T
    left, right = singular_vectors(matrix, a.out_features)
    with torch.no_grad():
        b.weight.copy_(left)
        a.weight.copy_(right)
    a.weight.requires_grad_(False)


def singular_vectors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first left (out, rank) and right (rank, in) singular vectors.

    Of the two signs that a pair can have, the largest value of the left one is positive.
    """
    left, _, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))  # (1, rank)
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return (left * signs).to(torch.float32), (right * signs.T).to(torch.float32)


def is_between(name: str) -> bool:
    """Tell whether a parameter of the network is an R."""
    return _BETWEEN in name


def saved_name(name: str) -> str:
    """Return an R's name in a saved adapter, beside PEFT's of its factors."""
    return name.replace(_BETWEEN, ".lora_R.")
