"""A model to be trained, and what differs between the kinds of models.

`families` has one Family per task; everything else in this folder knows models through it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.func import functional_call

from coordinator.plans.tokenization import TextTokenizer
from fedloom.adapters import Theta
from fedloom.plans import PlanOrigin, Role, TrainableTensor
from fedloom.tasks import Task

Batch = Mapping[str, torch.Tensor]  # inputs, labels and sample_weight by name


@dataclass(frozen=True)
class Sums:
    """What a graph adds up over a batch: float32 scalars; see `plan.proto`."""

    loss: torch.Tensor
    weight: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class BoundNetwork:
    """A network whose parameters and buffers are the given tensors while it runs."""

    network: torch.nn.Module
    values: Mapping[str, torch.Tensor]

    def __call__(self, *arguments: torch.Tensor, **named: object) -> Any:
        """Return what the network returns."""
        return functional_call(self.network, dict(self.values), arguments, named)

    def having(self, values: Mapping[str, torch.Tensor]) -> "BoundNetwork":
        """Return the same network with further values in place."""
        return replace(self, values={**self.values, **values})


class Family(ABC):
    """What differs between kinds of models: their inputs, their loss, and torch's own answer.

    `logits` and `sums` are traced, so they may look at no value of a tensor; `expected` is not and
    shares nothing with them, so that a mistake in one shows in the other.
    """

    task: Task

    @abstractmethod
    def logits(self, run: BoundNetwork, inputs: Batch) -> torch.Tensor:
        """Return the logits, shaped as the task's contract says."""

    @abstractmethod
    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> Sums:
        """Return the sums over a batch; `weight` (B,) is each row's."""

    @abstractmethod
    def example(self, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
        """Make a batch: padding, unequal weights, an empty row of weight 0; in contract order."""

    @abstractmethod
    def expected(self, network: torch.nn.Module, batch: Batch) -> tuple[Sums, torch.Tensor]:
        """Return sums and logits as torch and the model's own library compute them."""

    def extents(self) -> set[int]:
        """Return sizes inside the network that no parameter's shape shows."""
        return set()

    @property
    def longest(self) -> int | None:
        """The longest sequence that the network can take; None: any."""
        return None


@dataclass(frozen=True)
class AdaptedModel:
    """A model in evaluation mode (no dropout), all of its parameters frozen for torch.

    `trainable` and `frozen` are names of parameters and buffers of `network`; `layout[i]` is
    `trainable[i]` under its name in a saved adapter, `frozen_names[i]` is `frozen[i]` under its
    name in `base.safetensors`. `structure` is all that decides the graphs besides names and shapes;
    None when nothing that can be written down does. `adapter_config` is PEFT's.
    """

    network: torch.nn.Module
    family: Family
    layout: tuple[TrainableTensor, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    frozen_names: tuple[str, ...]
    theta: Theta
    origin: PlanOrigin
    structure: Mapping[str, object] | None = None
    tokenizer: TextTokenizer | None = None
    adapter_config: Mapping[str, object] | None = field(default=None)

    @property
    def task(self) -> Task:
        """What the plan is trained for."""
        return self.family.task

    @property
    def trained_tensors(self) -> int:
        """How many of `layout` have a gradient: all in front of the residuals."""
        return sum(tensor.role is not Role.RESIDUAL for tensor in self.layout)

    @property
    def trained_count(self) -> int:
        """T: how many values have a gradient."""
        return sum(tensor.size for tensor in self.layout[: self.trained_tensors])

    def frozen_tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the frozen weights in the order of `frozen`; each a distinct tensor object."""
        values = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        return tuple(values[name].detach() for name in self.frozen)

    def bound(self, pieces: Sequence[torch.Tensor], frozen: Sequence[torch.Tensor]) -> BoundNetwork:
        """Return the network with the trainable values `pieces` and the weights `frozen`."""
        values = dict(zip(self.trainable, pieces, strict=True))
        return BoundNetwork(self.network, values | dict(zip(self.frozen, frozen, strict=True)))


def frozen_names(network: torch.nn.Module, trainable: Sequence[str]) -> tuple[str, ...]:
    """Return parameters that are not trained, then buffers of numbers such as BatchNorm's."""
    taken = set(trainable)
    parameters = [name for name, _ in network.named_parameters() if name not in taken]
    buffers = [name for name, value in network.named_buffers() if value.is_floating_point()]
    return (*parameters, *buffers)
