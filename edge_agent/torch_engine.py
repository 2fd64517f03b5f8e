"""The engine of devices with torch: `eval.onnx` forward in torch, its gradient by autograd.

It needs nothing but the plan, and takes every task. Its sums are those of ONNX Runtime within
float32's rounding; with `bfloat16` within that of bfloat16.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.batches import Feeds
from edge_agent.data import DataSource
from edge_agent.local_training import LocalEngine, Step
from edge_agent.metrics import SUMS, evaluation_outputs
from edge_agent.torch_graph import TORCH_ERRORS, TorchGraph
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import EVAL_GRAPH, eval_contract
from fedloom.plans import Plan

# Rows and padded tokens in one training step: a CPU's as with ONNX Runtime, as its memory is the
# device's; an accelerator has memory of its own, and is idle with less.
_CPU_LIMITS = (16, 256)
_ACCELERATOR_LIMITS = (256, 8192)
_PINNED = frozenset(("cuda", "xpu"))  # copies from pinned memory go on while the device computes

Placed = Mapping[str, Tensor]


class TorchEngine(LocalEngine):
    """See LocalEngine; `device` is one of `available_devices`, or "auto" for the fastest.

    `threads` 0 leaves the number to torch; it is the process's. `bfloat16` computes products in
    that type: faster where the device has it, and other results. The weights stay on the device.
    Equal updates to the last bit need a CPU and the same number of threads.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        train_data: DataSource,
        held_out: DataSource | None,
        threads: int = 0,
        micro_batch: int = 0,
        micro_batch_tokens: int = 0,
        device: str = "auto",
        bfloat16: bool = False,
    ) -> None:
        self._device = find_device(device)
        rows, tokens = _CPU_LIMITS if self._device.type == "cpu" else _ACCELERATOR_LIMITS
        limits = micro_batch or rows, micro_batch_tokens or tokens
        super().__init__(folder, plan, train_data, held_out, *limits)
        self._bfloat16 = bfloat16
        if threads:
            torch.set_num_threads(threads)
        if not bfloat16:
            torch.backends.cudnn.allow_tf32 = False  # or convolutions have 10 bits of mantissa

    def _training_step(self) -> Step:
        count = self._plan.trained_count
        return _TrainingStep(self._graph, self._device, self._bfloat16, count)

    def _evaluation_step(self) -> Step:
        outputs = evaluation_outputs(self._plan.task)
        return _EvaluationStep(self._graph, self._device, self._bfloat16, outputs)

    @functools.cached_property
    def _graph(self) -> TorchGraph:
        contract = eval_contract(self._plan.task, self._plan.parameter_count)
        return TorchGraph(self._folder, self._plan, contract, self._device)


class _GraphStep:
    """A Step over a graph on a device."""

    def __init__(self, graph: TorchGraph, device: torch.device, bfloat16: bool) -> None:
        self._graph = graph
        self._device = device
        self._bfloat16 = bfloat16
        self.ahead = works_ahead(device)

    def place(self, feeds: Feeds) -> Placed:
        """See Step."""
        try:
            return {name: self._placed(values) for name, values in feeds.items()}
        except TORCH_ERRORS as error:
            raise Refused(
                Reason.TRAINING_FAILED,
                f"expected a batch to fit on the device, found torch's {type(error).__name__}",
            ) from error

    def _placed(self, values: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type in _PINNED:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _run(
        self, outputs: Sequence[str], theta: Tensor, placed: Placed, failure: Reason
    ) -> list[Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            return self._graph.run(outputs, {"theta": theta, **placed}, failure)


class _TrainingStep(_GraphStep):
    def __init__(
        self, graph: TorchGraph, device: torch.device, bfloat16: bool, trained_count: int
    ) -> None:
        super().__init__(graph, device, bfloat16)
        self._trained_count = trained_count

    def sums(self, theta: Theta, placed: Placed) -> list[NDArray[np.float32]]:
        """See Step."""
        count = self._trained_count
        values = torch.tensor(theta[:count], device=self._device, requires_grad=True)
        whole = values
        if count < len(theta):
            residuals = torch.tensor(theta[count:], device=self._device)
            whole = torch.cat([values, residuals])
        loss, weight, _ = self._run(SUMS, whole, placed, Reason.TRAINING_FAILED)
        gradient = _gradient(loss, values)
        return [value.detach().cpu().numpy() for value in (loss, weight, gradient)]


class _EvaluationStep(_GraphStep):
    def __init__(
        self, graph: TorchGraph, device: torch.device, bfloat16: bool, outputs: Sequence[str]
    ) -> None:
        super().__init__(graph, device, bfloat16)
        self._outputs = outputs

    def sums(self, theta: Theta, placed: Placed) -> list[NDArray[np.float32]]:
        """See Step."""
        with torch.inference_mode():
            values = torch.tensor(theta, device=self._device)
            found = self._run(self._outputs, values, placed, Reason.PLAN_UNSUPPORTED)
        return [value.cpu().numpy() for value in found]


def _gradient(loss: Tensor, theta: Tensor) -> Tensor:
    if not loss.requires_grad:  # whatever theta is, the loss is the same
        return torch.zeros_like(theta)
    try:
        (gradient,) = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
    except TORCH_ERRORS as error:
        raise Refused(
            Reason.TRAINING_FAILED,
            f"expected a gradient of {EVAL_GRAPH}, found torch's {type(error).__name__}",
        ) from error
    return gradient


def works_ahead(device: torch.device) -> bool:
    """Tell whether batches shall be made while the device computes."""
    return device.type != "cpu"


def available_devices() -> list[str]:
    """Return the names of the devices that torch can compute on here, the fastest first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    numbers = range(torch.accelerator.device_count())
    return [accelerator.type, *(f"{accelerator.type}:{number}" for number in numbers), "cpu"]


def find_device(name: str) -> torch.device:
    """Return a device by name; raises LookupError that lists the available ones."""
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise LookupError(f"expected one of {['auto', *available]}, found {name!r}")
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes products in bfloat16."""
    if not torch.amp.is_autocast_available(device.type):
        return False
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
