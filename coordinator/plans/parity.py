"""The mandatory check: a plan's graphs against torch, as ONNX Runtime runs them.

Every silent error met so far was found here: an exactly negated gradient, a gradient off by 2e-3,
an extent that the tracer took for a constant. What is expected comes from the family's `expected`,
which shares nothing with what was traced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from coordinator.plans.families.causal_lm import LanguageModel
from coordinator.plans.model import AdaptedModel, Batch
from coordinator.plans.request import PlanExportError
from fedloom.adapters import Theta
from fedloom.graph_contracts import (
    EVAL_GRAPH,
    GEN_GRAPH,
    INFER_GRAPH,
    TRAIN_DP_GRAPH,
    TRAIN_GRAPH,
    infer_contract,
)

TOLERANCE = 1e-4  # relative; float32 summed in another order stays below 3e-6
_SHAPES = ((2, 8), (5, 24))  # (batch, sequence), neither of them the traced one
_THETA_NOISE = 0.02  # so that LoRA B is not zero and A has a gradient
_SUMS = ("loss", "weight", "correct")

Outputs = list[NDArray[np.float32]]


@dataclass(frozen=True)
class TrainParity:
    """Relative differences between graph and torch, the worst of all shapes."""

    loss: float
    gradient: float  # L2 norm of the difference over the L2 norm of torch's gradient


def check_graphs(folder: Path, adapted: AdaptedModel) -> str:
    """Compare all graphs of a plan's folder with torch; return the differences, for people.

    Raises PlanExportError for the first graph beyond TOLERANCE.
    """
    with one_thread():
        train = check_train(folder, adapted)
        check_eval(folder, adapted)
        logits = check_infer(folder, adapted)
        if isinstance(adapted.family, LanguageModel):
            logits = max(logits, check_generation(folder, adapted, adapted.family))
        clipping = ""
        if (folder / TRAIN_DP_GRAPH).exists():
            clipping = f", clipped rows {check_train_dp(folder, adapted):.1e}"
    gradient = f"gradient {train.gradient:.1e}"
    return f"loss {train.loss:.1e}, {gradient}, logits {logits:.1e}{clipping}"


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
        batch = adapted.family.example(*shape, seed=sum(shape))
        found = _run(session, TRAIN_GRAPH, {"theta": theta, **_arrays(batch)})
        worst = _compare(
            TRAIN_GRAPH, (*_SUMS, "gradient"), found, torch_step(adapted, theta, batch)[:4], shape
        )
        loss, gradient = max(loss, worst[0]), max(gradient, worst[3])
    return TrainParity(loss, gradient)


def check_eval(folder: Path, adapted: AdaptedModel) -> None:
    """Compare sums and logits; raises PlanExportError(EVAL_GRAPH) beyond TOLERANCE."""
    session = _open(folder / EVAL_GRAPH)
    theta = _perturbed(adapted)
    for shape in _shapes(adapted):
        batch = adapted.family.example(*shape, seed=sum(shape))
        found = _run(session, EVAL_GRAPH, {"theta": theta, **_arrays(batch)})
        *sums, _, logits = torch_step(adapted, theta, batch)
        found[3], logits = _seen(found[3], batch), _seen(logits, batch)
        _compare(EVAL_GRAPH, (*_SUMS, "logits"), found, [*sums, logits], shape)


def check_infer(folder: Path, adapted: AdaptedModel) -> float:
    """Compare logits with theta given and with the adapter file's; return the relative difference.

    Raises PlanExportError(INFER_GRAPH) beyond TOLERANCE.
    """
    session = _open(folder / INFER_GRAPH)
    names = [name for name in infer_contract(adapted.task, 1).inputs if name != "theta"]
    worst = 0.0
    for shape in _shapes(adapted):
        batch = adapted.family.example(*shape, seed=sum(shape))
        inputs = {name: batch[name].numpy() for name in names}
        perturbed = _perturbed(adapted)
        for theta, given in ((perturbed, {"theta": perturbed}), (adapted.theta, {})):
            found = _seen(_run(session, INFER_GRAPH, {**given, **inputs})[0], batch)
            expected = _seen(torch_logits(adapted, theta, batch), batch)
            worst = max(worst, *_compare(INFER_GRAPH, ("logits",), [found], [expected], shape))
    return worst


def check_generation(folder: Path, adapted: AdaptedModel, family: LanguageModel) -> float:
    """Compare logits after a prompt, after some tokens and after one; return the difference.

    One row of three has padding on its left; torch sees each row alone, whole and without any.
    Raises PlanExportError(GEN_GRAPH) beyond TOLERANCE.
    """
    session = _open(folder / GEN_GRAPH)
    theta, task = _perturbed(adapted), family.task
    ids = np.random.default_rng(5).integers(0, task.vocabulary_size, (3, 9))
    padding = (0, 2, 0)
    mask = (np.arange(9) >= np.array(padding)[:, None]).astype(np.int64)
    with trained_values(adapted, theta), torch.no_grad():
        alone = [
            adapted.network(input_ids=torch.from_numpy(row[None, skip:]), use_cache=False).logits
            for row, skip in zip(ids, padding, strict=True)
        ]
    cache = [np.zeros((3, task.heads, 0, task.head_size), np.float32)] * (2 * task.layers)
    names = [port.name for port in session.get_inputs()][2:]
    worst, start = 0.0, 0
    for end in (5, 8, 9):
        tokens = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        past = dict(zip(names, cache, strict=True))
        logits, *cache = _run(session, GEN_GRAPH, {"theta": theta, **tokens, **past})
        pairs = zip(alone, padding, strict=True)
        expected = np.stack([row[0, end - skip - 1].numpy() for row, skip in pairs])
        worst = max(worst, *_compare(GEN_GRAPH, ("logits",), [logits], [expected], (3, end)))
        start = end
    return worst


def check_train_dp(folder: Path, adapted: AdaptedModel) -> float:
    """Compare norms and clipped sum with torch's gradients of one row after the other.

    Returns the worst relative difference; raises PlanExportError(TRAIN_DP_GRAPH) beyond TOLERANCE.
    """
    session = _open(folder / TRAIN_DP_GRAPH)
    theta = _perturbed(adapted)
    worst = 0.0
    for shape in _shapes(adapted):
        batch = adapted.family.example(*shape, seed=sum(shape))
        expected, clip = torch_clipped_step(adapted, theta, batch)
        found = _run(session, TRAIN_DP_GRAPH, {"theta": theta, "clip": clip, **_arrays(batch)})
        names = (*_SUMS, "clipped sum", "norms")
        worst = max(worst, *_compare(TRAIN_DP_GRAPH, names, found, expected, shape))
    return worst


def torch_clipped_step(
    adapted: AdaptedModel, theta: Theta, batch: Batch
) -> tuple[Outputs, NDArray[np.float32]]:
    """Return what `train_dp.onnx` promises, from one backward pass for each row, and the clip.

    The clip, (), lies among the rows' norms, so that some are scaled and some are not.
    """
    weights = batch["sample_weight"].numpy()
    sums, gradients = np.zeros(3, np.float32), []
    for i, weight in enumerate(weights):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        row["sample_weight"] = torch.ones(1)
        loss, labels, correct, gradient, _ = torch_step(adapted, theta, row)
        share = weight / max(labels, 1)  # a row of many labels counts as their mean
        sums += [share * value for value in (loss, labels, correct)]
        gradients.append(share * gradient)
    norms = np.linalg.norm(gradients, axis=1).astype(np.float32)  # (B,)
    clip = np.float32(0.9 * np.median(norms[norms > 0]))
    scale = clip / np.maximum(norms, clip)
    return [*sums, scale @ np.stack(gradients), norms], np.array(clip)


def torch_step(adapted: AdaptedModel, theta: Theta, batch: Batch) -> Outputs:
    """Return loss, weight, correct, gradient (T,) and logits, computed by torch's own means."""
    with trained_values(adapted, theta) as parameters:
        sums, logits = adapted.family.expected(adapted.network, batch)
        gradients = torch.autograd.grad(sums.loss, parameters[: adapted.trained_tensors])
    gradient = torch.cat([piece.reshape(-1) for piece in gradients])
    found = (sums.loss, sums.weight, sums.correct, gradient, logits)
    return [value.detach().numpy() for value in found]


def torch_logits(adapted: AdaptedModel, theta: Theta, batch: Batch) -> NDArray[np.float32]:
    """Return the logits, computed by torch's own means."""
    with trained_values(adapted, theta), torch.no_grad():
        _, logits = adapted.family.expected(adapted.network, batch)
    found: NDArray[np.float32] = logits.numpy()
    return found


@contextmanager
def trained_values(adapted: AdaptedModel, theta: Theta) -> Iterator[list[torch.Tensor]]:
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
    limit = adapted.family.longest
    return tuple((batch, min(sequence, limit or sequence)) for batch, sequence in _SHAPES)


def _seen(logits: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """Blank the logits (B, S, C) of padding, where positions are anyone's choice."""
    if logits.ndim != 3:
        return logits
    seen: NDArray[np.float32] = logits * batch["attention_mask"].numpy()[:, :, None]
    return seen


def _compare(
    graph: str, names: tuple[str, ...], found: Outputs, expected: Outputs, shape: tuple[int, int]
) -> list[float]:
    """Return the relative difference of each output; raises PlanExportError beyond TOLERANCE."""
    differences = [_relative(f, e) for f, e in zip(found, expected, strict=True)]
    if not all(difference <= TOLERANCE for difference in differences):  # NaN is not
        pairs = zip(names, differences, strict=True)
        figures = ", ".join(f"{name} {value:.1e}" for name, value in pairs)
        batch, sequence = shape
        raise PlanExportError(
            graph,
            f"expected at most {TOLERANCE:.0e} between graph and torch, "
            f"found {figures} at batch {batch} x {sequence}",
        )
    return differences


def _arrays(batch: Batch) -> dict[str, NDArray[np.generic]]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


def _relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = np.linalg.norm(np.ravel(found - expected))
    size = np.linalg.norm(np.ravel(expected))
    return float(difference / size) if size else float(difference)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
