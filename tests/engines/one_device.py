"""An accelerator that every machine has: torch's device without data, watched."""

from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edge_agent.torch_graph import TorchGraph
from fedloom.errors import Reason
from fedloom.graph_contracts import eval_contract
from fedloom.plans import Plan


class OneDevice(TorchDispatchMode):
    """Fails when an operation but a copy is given values of two devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Look at the operation, then do it."""
        tensors = [value for value in tree_leaves(args) if torch.is_tensor(value)]
        devices = {tensor.device.type for tensor in tensors}
        assert "copy" in str(function) or len(devices) <= 1, f"{function} on {devices}"
        return function(*args, **(kwargs or {}))


def gradient_shape(folder: Path, plan: Plan, feeds: dict[str, np.ndarray]) -> tuple[int, ...]:
    """Run a training step where only shapes are computed; return the gradient's."""
    device = torch.device("meta")
    graph = TorchGraph(folder, plan, eval_contract(plan.task, plan.parameter_count), device)
    placed = {name: torch.tensor(values, device=device) for name, values in feeds.items()}
    placed["theta"].requires_grad_()
    with OneDevice():
        loss, _ = graph.run(("loss_sum", "correct"), placed, Reason.TRAINING_FAILED)
        (gradient,) = torch.autograd.grad(loss, placed["theta"])
    return tuple(gradient.shape)
