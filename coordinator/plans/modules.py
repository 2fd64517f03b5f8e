"""What a factory of the task `module` returns. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainableModule:
    """A network on arrays, to be trained whole.

    `inputs` is the shape of one row of each array that `network` is called with, by name, in
    order. `network` returns logits (B, C): one for each of `labels`, or `values` numbers.
    `loss(logits, labels)` returns each row's loss (B,); its labels are (B,) int64 of classes, or
    (B, C) float32 of values. Parameters with `requires_grad` False are frozen. It runs in
    evaluation mode: no dropout, and BatchNorm's statistics stay as the factory leaves them, for
    devices could not agree on others. `head` is the module of `network` that gives the logits, for
    rules that treat it apart.
    """

    network: torch.nn.Module
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    inputs: Mapping[str, tuple[int, ...]]
    labels: tuple[str, ...] = ()
    values: int = 0
    head: str = ""
