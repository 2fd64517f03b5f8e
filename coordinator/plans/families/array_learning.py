"""Numbers in, classes or values out: any torch module with a loss, trained whole."""

import importlib

import torch

from coordinator.plans.families.encoders import example_weight
from coordinator.plans.model import AdaptedModel, Batch, BoundNetwork, Family, Sums, frozen_names
from coordinator.plans.modules import TrainableModule
from coordinator.plans.request import PlanRequest
from fedloom.errors import ConfigError, Refused
from fedloom.plans import PlanOrigin, Role, TrainableTensor
from fedloom.tasks import IGNORED_LABEL, ArrayInput, ArrayLearning

_ROWS = 3  # of the trial


def load_module(request: PlanRequest) -> AdaptedModel:
    """Make the module that the request's factory returns, and try it with a batch."""
    made = _make(request.model)
    try:
        inputs = tuple(ArrayInput(name, tuple(shape)) for name, shape in made.inputs.items())
        task = ArrayLearning(inputs, tuple(made.labels), made.values)
    except Refused as error:
        raise ConfigError("model", f"{request.model}: {error.subject}") from error
    network = made.network.float().eval()
    family = ArrayLearner(made, task)
    _try(network, family)
    parameters = dict(network.named_parameters())
    trainable = tuple(name for name, p in parameters.items() if p.requires_grad)
    frozen = frozen_names(network, trainable)
    network.requires_grad_(False)
    return AdaptedModel(
        network=network,
        family=family,
        layout=_layout(parameters, trainable, made.head),
        trainable=trainable,
        frozen=frozen,
        frozen_names=frozen,
        theta=torch.cat([parameters[name].detach().reshape(-1) for name in trainable]).numpy(),
        origin=PlanOrigin(request.model),
    )


class ArrayLearner(Family):
    """A module on arrays with its own loss."""

    task: ArrayLearning

    def __init__(self, made: TrainableModule, task: ArrayLearning) -> None:
        self.task = task
        self._loss = made.loss

    def extents(self) -> set[int]:
        """See Family."""
        return {extent for entry in self.task.inputs for extent in entry.shape}

    def logits(self, run: BoundNetwork, inputs: Batch) -> torch.Tensor:
        """Run the module."""
        logits: torch.Tensor = run(*(inputs[entry.name] for entry in self.task.inputs))
        return logits

    def sums(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> Sums:
        """Weigh the rows' losses; values are never right, and classes may be left out."""
        if self.task.values:
            losses = self._loss(logits, labels)
            return Sums((losses * weight).sum(), weight.sum(), weight.sum() * 0.0)
        learned = labels != IGNORED_LABEL
        targets, weight = torch.where(learned, labels, 0), weight * learned.to(torch.float32)
        losses = self._loss(logits, targets)
        hits = (logits.detach().argmax(-1) == targets).to(torch.float32)
        return Sums((losses * weight).sum(), weight.sum(), (hits * weight).sum())

    def example(self, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
        """See Family; there is no sequence."""
        generator = torch.Generator().manual_seed(seed)
        made = {
            entry.name: torch.randn((batch, *entry.shape), generator=generator)
            for entry in self.task.inputs
        }
        if self.task.values:
            labels = torch.randn((batch, self.task.values), generator=generator)
        else:
            labels = torch.randint(0, self.task.logits, (batch,), generator=generator)
        return {**made, "labels": labels, "sample_weight": example_weight(batch, generator)}

    def expected(self, network: torch.nn.Module, batch: Batch) -> tuple[Sums, torch.Tensor]:
        """See Family."""
        labels, weight = batch["labels"], batch["sample_weight"]
        logits: torch.Tensor = network(*(batch[entry.name] for entry in self.task.inputs))
        losses = self._loss(logits, labels)
        hits = torch.zeros(()) if self.task.values else logits.argmax(-1) == labels
        return Sums((losses * weight).sum(), weight.sum(), (hits * weight).sum()), logits


def _make(spec: str) -> TrainableModule:
    module, _, name = spec.partition(":")
    expected = (
        "expected package.module:factory, a function without arguments in a module that Python can "
        "import (installed, or in a folder of PYTHONPATH)"
    )
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("model", f"{expected}, found {spec}: {error}") from error
    made = factory()
    if not isinstance(made, TrainableModule):
        raise ConfigError(
            "model",
            f"expected {spec} to return a coordinator.plans.TrainableModule, "
            f"found {type(made).__name__}",
        )
    return made


def _try(network: torch.nn.Module, family: ArrayLearner) -> None:
    """Run a batch, so that what does not fit is said here and not by an exporter."""
    batch = family.example(_ROWS, 0, seed=0)
    logits = network(*(batch[entry.name] for entry in family.task.inputs))
    _require(logits, (_ROWS, family.task.logits), "the network to return logits")
    sums, _ = family.expected(network, batch)
    losses = family._loss(logits, batch["labels"])
    _require(losses, (_ROWS,), "the loss function to return one loss for each row")
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError("model", "expected parameters with requires_grad, found none")
    gradients = torch.autograd.grad(sums.loss, list(trainable.values()), allow_unused=True)
    for name, gradient in zip(trainable, gradients, strict=True):
        if gradient is None:
            raise ConfigError(
                "model",
                f"expected every trainable parameter to bear on the loss, found {name}, which does "
                "not: set its requires_grad to False",
            )


def _require(found: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(found.shape) != shape:
        raise ConfigError(
            "model",
            f"expected {what} of shape {shape} for {_ROWS} rows, found {tuple(found.shape)}",
        )


def _layout(
    parameters: dict[str, torch.nn.Parameter], trainable: tuple[str, ...], head: str
) -> tuple[TrainableTensor, ...]:
    layout: list[TrainableTensor] = []
    offset = 0
    for name in trainable:
        role = Role.HEAD if head and name.startswith(f"{head}.") else Role.WEIGHT
        shape = tuple(parameters[name].shape)
        layout.append(TrainableTensor(name, shape, offset, role))
        offset += parameters[name].numel()
    if head and not any(tensor.role is Role.HEAD for tensor in layout):
        raise ConfigError("model", f"expected the head {head} to have trainable parameters")
    return tuple(layout)
