"""Virtual clients of a torch module, a group at a time: one vmap over their models and batches.

It pays for small models: what a step of them costs is mostly the calls, and a group makes them
once. Padding makes batches alike and weighs nothing. The last bits are not those of
`torch_mover`, since sums are taken in another order; they depend on the group, never on who
computes it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.batches import Examples, Indices
from edge_agent.engine import Evaluation, LocalUpdate
from edge_agent.local_rules import LocalSteps
from fedloom.adapters import Theta
from fedloom.errors import ConfigError, Refused
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining, steps_of
from simulation.clients import INPUT, Clients
from simulation.movers import Journey, checked
from simulation.torch_mover import (
    Loss,
    batches_of,
    copied,
    evaluate,
    layout_of,
    own_randomness,
    point_to,
    require_stateless,
    threads,
)

Matrix = NDArray[np.float32]  # (group, P)


class VectorisedMover:
    """See Mover. The loss must be a mean over rows, the module nothing that vmap refuses."""

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Loss,
        clients: Clients,
        held_out: Examples | None = None,
        threads: int = 1,
        group: int = 16,
        head: str = "",
    ) -> None:
        require_stateless(module)
        self._module = copied(module, threads)
        self.layout = layout_of(module, head)
        self._loss = loss
        self._clients = clients
        self._held_out = held_out
        self._threads = threads
        self._group = group
        self._row_loss = _row_losses(loss)
        self._logits = torch.func.vmap(self._client_logits, randomness="different")

    @property
    def group(self) -> int:
        """See Mover."""
        return self._group

    def takes(self, theta: Theta) -> bool:
        """Try two of the clients for a step: whether vmap takes the module and the loss."""
        chosen = list(self._clients)[:2]
        terms = LocalTraining(batch_size=2, local_steps=1)
        try:
            self.move([Journey(name, 0, theta) for name in chosen], terms, None)
        except ConfigError:
            return False
        return True

    def _client_logits(
        self, parameters: dict[str, torch.Tensor], inputs: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = torch.func.functional_call(self._module, parameters, (inputs,))
        return logits

    def _gradients(
        self, models: dict[str, torch.Tensor], batch: "_Batch"
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Return each client's gradient, tensor by tensor, and each client's loss.

        A client's loss depends on its own model alone: one backward pass of their sum is that of
        all.
        """
        leaves = {name: model.detach().requires_grad_() for name, model in models.items()}
        logits = self._logits(leaves, batch.inputs)
        rows = self._row_loss(logits.flatten(0, 1), batch.labels.flatten(0, 1))
        losses = (rows.view_as(batch.share) * batch.share).sum(1)
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        return found, losses.detach()

    def move(
        self, journeys: Sequence[Journey], terms: LocalTraining, parts: Parts | None
    ) -> list[LocalUpdate | Refused]:
        """See Mover."""
        self._module.train()
        with threads(self._threads), own_randomness():
            torch.default_generator.manual_seed(journeys[0].order_seed)
            try:
                return self._moved(journeys, terms, parts)
            except (NotImplementedError, RuntimeError) as error:
                raise ConfigError(
                    "vectorise",
                    "expected a module and a loss that torch.func.vmap takes; train one client "
                    f"after another instead. Found: {str(error)[:300]}",
                ) from error

    @np.errstate(over="ignore", invalid="ignore")  # divergence is found and refused
    def _moved(
        self, journeys: Sequence[Journey], terms: LocalTraining, parts: Parts | None
    ) -> list[LocalUpdate | Refused]:
        held = [self._clients[journey.client] for journey in journeys]
        steps = [steps_of(terms, len(own)) for own in held]
        trained: Matrix = np.stack([journey.start for journey in journeys])
        gradient: Matrix = np.empty_like(trained)
        stepper = _stepper(journeys, terms, steps, parts)
        models, slopes = self._views(trained), self._views(gradient)
        orders = [
            batches_of(own, terms, count, journey.order_seed)
            for own, count, journey in zip(held, steps, journeys, strict=True)
        ]
        losses, rows_seen = np.zeros(len(held)), np.zeros(len(held))
        for _ in range(max(steps)):
            batch = _padded(held, [next(order, None) for order in orders])
            found, loss = self._gradients(models, batch)
            for slope, part in zip(slopes.values(), found, strict=True):
                slope.copy_(part)
            stepper.step(trained, gradient)
            losses += loss.numpy() * batch.counts
            rows_seen += batch.counts
        for row, journey in zip(trained, journeys, strict=True):
            row -= journey.start
        return [
            stepper.refused.get(index)
            or checked(trained[index], len(own), losses[index] / rows_seen[index])
            for index, own in enumerate(held)
        ]

    def _views(self, matrix: Matrix) -> dict[str, torch.Tensor]:
        flat, rows = torch.from_numpy(matrix), len(matrix)
        return {
            tensor.name: flat[:, tensor.offset : tensor.offset + tensor.size].view(
                rows, *self._module.get_parameter(tensor.name).shape
            )
            for tensor in self.layout
        }

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """See Mover."""
        if self._held_out is None:
            return None
        trainable = [p for p in self._module.parameters() if p.requires_grad]
        point_to(trainable, theta.copy())
        with threads(self._threads):
            return evaluate(self._module, self._loss, self._held_out)


class _Batch:
    """A group's batches as tensors of one shape; `counts` (group,) are the rows that are real."""

    def __init__(self, inputs: Any, labels: Any, share: Any, counts: NDArray[np.int64]) -> None:
        self.inputs, self.labels, self.share, self.counts = inputs, labels, share, counts


def _padded(held: Sequence[Examples], batches: Sequence[Indices | None]) -> _Batch:
    """Stack batches; a client that has made its steps takes part with rows that weigh nothing."""
    nothing = np.zeros(0, np.int64)
    rows = [nothing if batch is None else batch for batch in batches]
    counts = np.array([len(batch) for batch in rows])
    widest = int(counts.max())
    share = np.zeros((len(rows), widest), np.float32)
    inputs, labels = [], []
    for index, (own, batch) in enumerate(zip(held, rows, strict=True)):
        if len(batch):
            share[index, : len(batch)] = 1 / len(batch)
        full = np.concatenate([batch, np.zeros(widest - len(batch), np.int64)])
        inputs.append(own.inputs(full)[INPUT])
        labels.append(own.labels(full))
    stacked = torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(labels))
    return _Batch(*stacked, torch.from_numpy(share), counts)


def _row_losses(loss: Loss) -> Loss:
    """Return what gives each row's loss, (rows,), from what gives their mean."""
    if loss is torch.nn.functional.cross_entropy:
        loss = torch.nn.CrossEntropyLoss()
    if getattr(loss, "reduction", "") == "mean" and getattr(loss, "weight", None) is None:
        single = copy.copy(loss)
        single.reduction = "none"  # type: ignore[attr-defined]  # it has one
        return lambda logits, labels: single(logits, labels).reshape(len(logits), -1).mean(1)
    return torch.func.vmap(lambda one, label: loss(one[None], label[None]).mean())


class _Stepper:
    """Steps of clients that make as many: elementwise, so that one vector stands for all."""

    def __init__(self, journeys: Sequence[Journey], terms: LocalTraining, steps: int) -> None:
        self.refused: dict[int, Refused] = {}
        starts = np.concatenate([journey.start for journey in journeys])
        own = [journey.linear for journey in journeys if journey.linear is not None]
        joined = np.concatenate(own) if own else None
        self._local = LocalSteps(starts, terms, steps, joined)

    def step(self, trained: Matrix, gradient: Matrix) -> None:
        self._local.step(trained.reshape(-1), gradient.reshape(-1))


class _SingleSteppers:
    """Steps of clients each by itself: another number of them, a norm or parts of its own."""

    def __init__(
        self,
        journeys: Sequence[Journey],
        terms: LocalTraining,
        steps: Sequence[int],
        parts: Parts | None,
    ) -> None:
        self.refused: dict[int, Refused] = {}
        self._local: dict[int, LocalSteps] = {}
        for index, (journey, count) in enumerate(zip(journeys, steps, strict=True)):
            try:
                local = LocalSteps(journey.start, terms, count, journey.linear, parts)
            except Refused as refused:  # fewer steps than its head needs
                self.refused[index] = refused
            else:
                self._local[index] = local
        self._left = list(steps)

    def step(self, trained: Matrix, gradient: Matrix) -> None:
        for index, local in self._local.items():
            if self._left[index]:
                local.step(trained[index], gradient[index])
                self._left[index] -= 1


def _stepper(
    journeys: Sequence[Journey], terms: LocalTraining, steps: Sequence[int], parts: Parts | None
) -> _Stepper | _SingleSteppers:
    if len(set(steps)) == 1 and not terms.gradient_clip and parts is None:
        return _Stepper(journeys, terms, steps[0])
    return _SingleSteppers(journeys, terms, steps, parts)
