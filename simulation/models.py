"""A model to simulate with: a torch module, or a plan's folder. Both end as movers and a theta."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_agent.batches import Examples, LabelledArrays
from edge_agent.data import DataSource
from edge_agent.engine import Evaluation
from edge_agent.examples import read_examples
from fedloom.adapters import Theta, read_adapter
from fedloom.errors import ConfigError
from fedloom.exports import export_model
from fedloom.plans import ADAPTER_FILE, Plan, PlanOrigin, load_plan, verify_members
from fedloom.quality import Quality
from fedloom.tasks import ArrayInput, ArrayLearning
from simulation.clients import INPUT, Clients, as_examples
from simulation.movers import Mover

if TYPE_CHECKING:
    import torch

MOST_VECTORISED = 1 << 16  # parameters; beyond, calls cost little and memory decides
_GROUPED = 1 << 20  # parameters of all models of a group: more fall out of the caches
_MOST_CLIENTS = 64  # of a group


@dataclass(frozen=True)
class Work:
    """How clients are trained: `make` makes a mover, in any process, for groups of `group`."""

    make: Callable[[], Mover]
    group: int


class Model(Protocol):
    """What is trained."""

    @property
    def plan(self) -> Plan:
        """Its layout, as that of a plan."""
        ...

    @property
    def theta(self) -> Theta:
        """What training begins with, (P,)."""
        ...

    def examples(self, data: object) -> Examples:
        """Return what a person calls data."""
        ...

    def work(self, clients: Clients, held_out: Examples | None) -> Work:
        """Return how clients of these data are trained."""
        ...

    def trained(self, theta: Theta) -> Any:
        """Return the model with these values."""
        ...


class ModuleModel:
    """See Model: a torch module and `loss(logits, labels)`, a mean over rows."""

    def __init__(
        self,
        module: "torch.nn.Module",
        loss: Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"],
        vectorise: bool | None,
        head: str = "",
    ) -> None:
        from simulation.torch_mover import layout_of, require_stateless, theta_of

        require_stateless(module)
        self._module = module
        self._loss = loss
        self._vectorise = vectorise
        self._head = head
        # The task is not looked at: what a row is, the clients' own arrays say.
        task = ArrayLearning((ArrayInput(INPUT, ()),), values=1)
        self.plan = Plan("module", (), layout_of(module, head), task, PlanOrigin("module"))
        self.theta = theta_of(module)

    def examples(self, data: object) -> Examples:
        """See Model."""
        return as_examples(data)

    def work(self, clients: Clients, held_out: Examples | None) -> Work:
        """See Model."""
        from simulation.torch_mover import TorchMover
        from simulation.vectorised import VectorisedMover

        module, loss, head = self._module, self._loss, self._head
        if self._vectorised(clients):
            group = max(2, min(_MOST_CLIENTS, _GROUPED // len(self.theta)))
            return Work(
                lambda: VectorisedMover(module, loss, clients, held_out, group=group, head=head),
                group,
            )
        return Work(lambda: TorchMover(module, loss, clients, held_out, head=head), 1)

    def _vectorised(self, clients: Clients) -> bool:
        """Decide by the model alone, or by what was asked for: never by who computes."""
        if self._vectorise is not None:
            return self._vectorise
        if len(self.theta) > MOST_VECTORISED:
            return False
        from simulation.vectorised import VectorisedMover

        mover = VectorisedMover(self._module, self._loss, clients, group=2)
        return mover.takes(self.theta)

    def trained(self, theta: Theta) -> "torch.nn.Module":
        """See Model: a copy of the module."""
        from simulation.torch_mover import point_to

        module = copy.deepcopy(self._module).float()
        point_to([p for p in module.parameters() if p.requires_grad], theta.copy())
        return module


def module_quality(evaluation: Evaluation) -> Quality:
    """Return what is known of a torch module: its rows' classes are right, or not."""
    accuracy = evaluation.correct / evaluation.count
    return Quality(1.0, None, evaluation.mean_loss, accuracy)


class PlanModel:
    """See Model: a plan's folder, whose members are compared with their hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = load_plan(folder)
        verify_members(self.plan, folder)
        self.theta = read_adapter(folder / ADAPTER_FILE, self.plan.layout)

    def examples(self, data: object) -> Examples:
        """See Model: a file's path, a DataSource, or arrays for a plan of one array."""
        if isinstance(data, str | Path):
            data = DataSource(Path(data))
        if isinstance(data, DataSource):
            examples, _ = read_examples(self.folder, self.plan, data)
            return examples
        task, found = self.plan.task, as_examples(data)
        if not isinstance(found, LabelledArrays) or INPUT not in found.arrays:
            return found
        if not isinstance(task, ArrayLearning) or len(task.inputs) != 1:
            raise ConfigError("data", "expected a file for this plan, found arrays")
        (port,) = task.inputs
        values = np.asarray(found.arrays[INPUT], np.float32)
        return LabelledArrays({port.name: values.reshape(-1, *port.shape)}, found.learned)

    def work(self, clients: Clients, held_out: Examples | None) -> Work:
        """See Model."""
        from simulation.plan_mover import PlanMover

        folder, plan = self.folder, self.plan
        return Work(lambda: PlanMover(folder, plan, clients, held_out), 1)

    def trained(self, theta: Theta) -> dict[str, Theta]:
        """See Model: the trained tensors by name."""
        return {
            tensor.name: theta[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
            for tensor in self.plan.layout
        }

    def export(self, theta: Theta, folder: Path) -> None:
        """Write the model as a device does: `infer.onnx` answers with these values."""
        export_model(self.folder, self.plan, theta, folder)
