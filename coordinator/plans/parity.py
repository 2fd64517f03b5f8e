"""The mandatory check: a plan's graphs against torch + peft, as ONNX Runtime runs them.

Every silent error met so far was found here: an exactly negated gradient, a gradient off by 2e-3,
an extent that the tracer took for a constant. torch gets the plain two-dimensional mask and its
own loss; nothing of `graphs` is reused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from coordinator.plans.graphs import example_batch
from coordinator.plans.model import AdaptedModel, position_limit
from coordinator.plans.request import PlanExportError
from fedloom.adapters import Theta
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH

TOLERANCE = 1e-4  # relative; float32 summed in another order stays below 3e-6
_SHAPES = ((2, 8), (5, 24))  # (batch, sequence), neither of them the traced one
_THETA_NOISE = 0.02  # so that LoRA B is not zero and A has a gradient

Outputs = list[NDArray[np.float32]]


@dataclass(frozen=True)
class TrainParity:
    """Relative differences between graph and torch, the worst of all shapes."""

    loss: float
    gradient: float  # L2 norm of the difference over the L2 norm of torch's gradient


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one core: beside other work its busy waiting makes tiny batches 10x slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_train(folder: Path, adapted: AdaptedModel) -> TrainParity:
    """Compare loss, counts and gradient; raises PlanExportError(TRAIN_GRAPH) beyond TOLERANCE."""
    session = _open(folder / TRAIN_GRAPH)
    theta = _perturbed(adapted)
    loss, gradient = 0.0, 0.0
    for shape in _shapes(adapted):
        batch = example_batch(adapted, *shape, seed=sum(shape))
        found = _run(session, TRAIN_GRAPH, {"theta": theta, **_arrays(batch)})
        expected = torch_step(adapted, theta, batch)
        worst = [_relative(f, e) for f, e in zip(found, expected, strict=True)]
        if not max(worst) <= TOLERANCE:  # also true of NaN
            figures = ", ".join(
                f"{name} {value:.1e}"
                for name, value in zip(
                    ("loss", "weight", "correct", "gradient"), worst, strict=True
                )
            )
            raise PlanExportError(TRAIN_GRAPH, _difference(figures, shape))
        loss, gradient = max(loss, worst[0]), max(gradient, worst[3])
    return TrainParity(loss, gradient)


def check_infer(folder: Path, adapted: AdaptedModel) -> float:
    """Compare logits with theta given and with the adapter file's; return the relative difference.

    Raises PlanExportError(INFER_GRAPH) beyond TOLERANCE.
    """
    session = _open(folder / INFER_GRAPH)
    worst = 0.0
    for shape in _shapes(adapted):
        batch = example_batch(adapted, *shape, seed=sum(shape))
        tokens = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        for theta, feed in (
            (_perturbed(adapted), {"theta": _perturbed(adapted)}),
            (adapted.theta, {}),
        ):
            found = _run(session, INFER_GRAPH, {**feed, **tokens})[0]
            difference = _relative(found, torch_logits(adapted, theta, batch))
            if not difference <= TOLERANCE:
                raise PlanExportError(INFER_GRAPH, _difference(f"logits {difference:.1e}", shape))
            worst = max(worst, difference)
    return worst


def torch_step(adapted: AdaptedModel, theta: Theta, batch: dict[str, torch.Tensor]) -> Outputs:
    """Return what `train.onnx` promises, computed by torch + peft: four arrays."""
    with _values(adapted, theta) as parameters:
        logits = _forward(adapted, batch)
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        loss_sum = (losses * batch["sample_weight"]).sum()
        gradients = torch.autograd.grad(loss_sum, parameters)
    hits = (logits.argmax(-1) == batch["labels"]) * batch["sample_weight"]
    gradient = torch.cat([piece.reshape(-1) for piece in gradients])
    scalars = (loss_sum.detach(), batch["sample_weight"].sum(), hits.sum())
    return [value.numpy() for value in (*scalars, gradient)]


def torch_logits(
    adapted: AdaptedModel, theta: Theta, batch: dict[str, torch.Tensor]
) -> NDArray[np.float32]:
    """Return the logits, (B, C), computed by torch + peft."""
    with _values(adapted, theta), torch.no_grad():
        logits: NDArray[np.float32] = _forward(adapted, batch).numpy()
    return logits


def _forward(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: torch.Tensor = adapted.network(**tokens).logits
    return logits


@contextmanager
def _values(adapted: AdaptedModel, theta: Theta) -> Iterator[list[torch.Tensor]]:
    """Put `theta` into the network for a while, as parameters that require gradients."""
    by_name = dict(adapted.network.named_parameters())
    parameters: list[torch.Tensor] = [by_name[name] for name in adapted.trainable]
    _load(adapted, parameters, theta)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        _load(adapted, parameters, adapted.theta)


def _load(adapted: AdaptedModel, parameters: list[torch.Tensor], theta: Theta) -> None:
    with torch.no_grad():
        for tensor, parameter in zip(adapted.layout, parameters, strict=True):
            values = theta[tensor.offset : tensor.offset + tensor.size]
            parameter.copy_(torch.from_numpy(values).view(tensor.shape))


def _open(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's classes derive from Exception alone
        raise PlanExportError(
            path.name, f"ONNX Runtime refuses it: {_first_line(error)}"
        ) from error


def _run(
    session: onnxruntime.InferenceSession, graph: str, feed: dict[str, NDArray[np.generic]]
) -> Outputs:
    try:
        outputs: Outputs = session.run(None, feed)
    except Exception as error:  # the runtime's classes derive from Exception alone
        raise PlanExportError(graph, f"ONNX Runtime fails: {_first_line(error)}") from error
    return outputs


def _perturbed(adapted: AdaptedModel) -> Theta:
    noise = np.random.default_rng(3).standard_normal(len(adapted.theta), np.float32)
    theta: Theta = adapted.theta + np.float32(_THETA_NOISE) * noise
    return theta


def _shapes(adapted: AdaptedModel) -> tuple[tuple[int, int], ...]:
    limit = position_limit(adapted.network)
    return tuple((batch, min(sequence, limit or sequence)) for batch, sequence in _SHAPES)


def _arrays(batch: dict[str, torch.Tensor]) -> dict[str, NDArray[np.generic]]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


def _relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = np.linalg.norm(np.ravel(found - expected))
    size = np.linalg.norm(np.ravel(expected))
    return float(difference / size) if size else float(difference)


def _difference(figures: str, shape: tuple[int, int]) -> str:
    batch, sequence = shape
    return (
        f"expected at most {TOLERANCE:.0e} between graph and torch, "
        f"found {figures} at batch {batch} x {sequence}"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
