"""Virtual clients of a torch module, one after another: torch computes gradients, the rest is ours.

A client's model is one flat vector, and the module's parameters are views into it, so that
`edge_agent.local_rules` moves it as on a device, whatever the strategy. The module trains in
training mode; what is random in it (dropout) follows from the client's seed.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from edge_agent.batches import Examples, Indices, training_batches
from edge_agent.engine import Evaluation, LocalUpdate
from edge_agent.local_rules import LocalSteps
from edge_agent.optimisers import Vector
from fedloom.adapters import Theta
from fedloom.errors import ConfigError, Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining, steps_of
from simulation.clients import INPUT, Clients
from simulation.movers import Journey, checked

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits, labels) -> mean over rows
_EVALUATION_ROWS = 1024


class TorchMover:
    """See Mover. The caller's module is copied and stays as it is."""

    group = 1

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Loss,
        clients: Clients,
        held_out: Examples | None = None,
        threads: int = 1,
        head: str = "",
    ) -> None:
        require_stateless(module)
        self.layout = layout_of(module, head)
        self._module = copied(module, threads)
        self._loss = loss
        self._clients = clients
        self._held_out = held_out
        self._threads = threads
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]

    def move(
        self, journeys: Sequence[Journey], terms: LocalTraining, parts: Parts | None
    ) -> list[LocalUpdate | Refused]:
        """See Mover."""
        with threads(self._threads), own_randomness():
            return [self._moved(journey, terms, parts) for journey in journeys]

    @np.errstate(over="ignore", invalid="ignore")  # divergence is found and refused
    def _moved(
        self, journey: Journey, terms: LocalTraining, parts: Parts | None
    ) -> LocalUpdate | Refused:
        held, start = self._clients[journey.client], journey.start
        steps = steps_of(terms, len(held))
        try:
            local = LocalSteps(start, terms, steps, journey.linear, parts)
        except Refused as refused:  # fewer steps than its head needs
            return refused
        trained, gradient = start.copy(), np.empty(len(start), np.float32)
        self._point_to(trained)
        self._module.train()
        loss_sum = weight_sum = 0.0
        torch.default_generator.manual_seed(journey.order_seed)
        for rows in batches_of(held, terms, steps, journey.order_seed):
            loss_sum += len(rows) * self._gradient(held, rows, gradient)
            weight_sum += len(rows)
            local.step(trained, gradient)
        return checked(np.subtract(trained, start, out=trained), len(held), loss_sum / weight_sum)

    def _gradient(self, held: Examples, rows: Indices, out: Vector) -> float:
        """Put the gradient of the mean loss into `out` and return the loss."""
        inputs, labels = tensors(held, rows)
        loss = self._loss(self._module(inputs), labels)
        loss = loss.mean() if loss.dim() else loss
        parts = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        torch.cat([part.reshape(-1) for part in parts], out=torch.from_numpy(out))
        return loss.item()

    def _point_to(self, theta: Theta) -> None:
        point_to(self._parameters, theta)

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """See Mover."""
        if self._held_out is None:
            return None
        self._point_to(theta.copy())
        with threads(self._threads):
            return evaluate(self._module, self._loss, self._held_out)


def evaluate(module: torch.nn.Module, loss: Loss, held: Examples) -> Evaluation:
    """Return a module's quality, in evaluation mode; what has no classes is never right."""
    module.eval()
    total, correct = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(held), _EVALUATION_ROWS):
            rows = np.arange(start, min(start + _EVALUATION_ROWS, len(held)))
            inputs, labels = tensors(held, rows)
            logits = module(inputs)
            total += len(rows) * loss(logits, labels).mean().item()
            if labels.dtype == torch.int64 and logits.dim() == labels.dim() + 1:
                hits = logits.argmax(1) == labels
                correct += int(hits.reshape(len(rows), -1).all(1).sum())
    return Evaluation(len(held), correct, total / len(held))


def batches_of(
    held: Examples, terms: LocalTraining, steps: int, order_seed: int
) -> Iterator[Indices]:
    """Yield the batches of so many steps, in the order in which an agent takes them."""
    epochs = math.ceil(steps / math.ceil(len(held) / terms.batch_size))
    batches = training_batches(held.lengths, terms.batch_size, epochs, order_seed, 0)
    return itertools.islice(batches, steps)


def tensors(held: Examples, rows: Indices) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input and the labels of some rows."""
    return torch.from_numpy(held.inputs(rows)[INPUT]), torch.from_numpy(held.labels(rows))


def copied(module: torch.nn.Module, threads_: int) -> torch.nn.Module:
    """Return a copy of the module, made by so many threads.

    In a forked worker torch's other threads stayed behind, with the caller: it would wait for them
    for ever with the first large tensor that it copies.
    """
    with threads(threads_):
        return copy.deepcopy(module).float()


def point_to(parameters: Sequence[torch.nn.Parameter], theta: Theta) -> None:
    """Make the parameters views into a flat vector (P,)."""
    flat, offset = torch.from_numpy(theta), 0
    for parameter in parameters:
        count = parameter.numel()
        parameter.data = flat[offset : offset + count].view(parameter.shape)
        offset += count


def layout_of(module: torch.nn.Module, head: str = "") -> tuple[TrainableTensor, ...]:
    """Return where each trainable parameter lies in theta; `head` names a module within."""
    layout: list[TrainableTensor] = []
    offset = 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shape = tuple(parameter.shape) or (1,)
            layout.append(TrainableTensor(name, shape, offset, _role(name, head)))
            offset += parameter.numel()
    if not layout:
        raise ConfigError("model", "expected parameters with requires_grad, found none")
    if head and all(tensor.role is not Role.HEAD for tensor in layout):
        raise ConfigError("head", f"expected a module with trainable parameters, found {head!r}")
    return tuple(layout)


def _role(name: str, head: str) -> Role:
    """Return what a parameter is; factors are named as PEFT names them."""
    path = name.split(".")
    if "lora_A" in path:
        return Role.LORA_A
    if "lora_B" in path:
        return Role.LORA_B
    return Role.HEAD if head and name.startswith(f"{head}.") else Role.WEIGHT


def theta_of(module: torch.nn.Module) -> Theta:
    """Return the trainable values, (P,) float32."""
    parts = [p.detach().float().reshape(-1) for p in module.parameters() if p.requires_grad]
    theta: Theta = torch.cat(parts).cpu().numpy().copy()
    return theta


def require_stateless(module: torch.nn.Module) -> None:
    """Refuse running statistics: they are no part of what is added up, and would be lost."""
    for name, part in module.named_modules():
        if getattr(part, "running_mean", None) is not None:
            raise ConfigError(
                "model",
                f"expected no running statistics, found {name} ({type(part).__name__}): use "
                "GroupNorm or LayerNorm, or track_running_stats=False",
            )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads: how many there are decides the last bits of a result."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the caller's random numbers as they were.

    Not by torch.manual_seed, which speaks to every kind of device: 0.3 ms for each client.
    """
    before = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
