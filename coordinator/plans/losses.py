"""Losses written out, so that their gradients survive the way to ONNX.

Not `F.cross_entropy`: torch.onnx gives `nll_loss_forward` a wrong total weight, and the gradient
comes out exactly negated.
"""

from typing import Any

import torch

from coordinator.plans.model import Sums
from fedloom.tasks import IGNORED_LABEL


def cross_entropy_sums(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> Sums:
    """Return the sums of logits (..., C) for class labels (...); `weight` (B,) is each row's.

    A label IGNORED_LABEL counts for nothing.
    """
    targets = labels.reshape(-1)  # (T,)
    learned = targets != IGNORED_LABEL
    of_row = weight.reshape(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
    weights = of_row.reshape(-1) * learned.to(torch.float32)  # (T,)
    targets = torch.where(learned, targets, 0)
    rows = logits.reshape(-1, logits.shape[-1])  # (T, C)
    loss = _CrossEntropy.apply(rows, targets, weights)  # type: ignore[no-untyped-call] # torch's
    hits = (rows.detach().argmax(-1) == targets).to(torch.float32)
    return Sums(loss, weights.sum(), (hits * weights).sum())


class _CrossEntropy(torch.autograd.Function):
    """The weighted sum of cross-entropies; its gradient needs two arrays of the logits' size."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        log_probabilities = torch.log_softmax(logits, -1)  # (T, C)
        ctx.save_for_backward(log_probabilities, targets, weights)
        chosen = log_probabilities.gather(-1, targets[:, None])[:, 0]  # (T,)
        return -(chosen * weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_probabilities, targets, weights = ctx.saved_tensors
        minus_one = torch.full_like(weights, -1.0)[:, None]
        slope = log_probabilities.exp().scatter_add(-1, targets[:, None], minus_one)
        return slope * (weights * gradients[0])[:, None], None, None
