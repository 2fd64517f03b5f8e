"""The training step whose gradient is clipped row by row: what becomes `train_dp.onnx`.

Every row of a batch gets its own copy of the trainable values (a view, until the graph is run), so
that autograd gives one gradient for each row; the frozen network needs no copy. A layer with such
values is a batched product, two of them for LoRA. Abadi et al., arXiv:1607.00133v2, Algorithm 1,
"clip gradient"; the noise is the device's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from coordinator.plans.graphs import Step, Trace, example_batch, leaves
from coordinator.plans.model import AdaptedModel
from coordinator.plans.request import PlanExportError
from fedloom.graph_contracts import TRAIN_DP_GRAPH, train_dp_contract
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)

_NO_DIVISION_BY_ZERO = 1e-12

Layer = Callable[..., torch.Tensor]


def clipping_trace(adapted: AdaptedModel) -> Trace:
    """Return what to trace for `train_dp.onnx`."""
    example = {"theta": torch.from_numpy(adapted.theta), **example_batch(adapted)}
    contract = train_dp_contract(adapted.task, len(adapted.theta), adapted.trained_count)
    example["clip"] = torch.tensor(1.0)
    return Trace(clipped_training_step(adapted), example, (contract,))


def clipped_training_step(adapted: AdaptedModel) -> Step:
    """Return a step: (theta (P,), inputs, labels, weight (B,), clip (), frozen)."""
    names = [*adapted.family.example(2, 2, seed=0), "clip"]

    def step(theta: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, frozen = dict(zip(names, rest, strict=False)), rest[len(names) :]
        labels, clip = batch.pop("labels"), batch.pop("clip")
        weight = _weight_of_labels(adapted.task, labels, batch.pop("sample_weight"))
        with torch.enable_grad():
            whole, residuals = leaves(adapted, theta)
            pieces = for_each_row(whole, labels.shape[0])
            with RowParameters(pieces):
                run = adapted.bound([*pieces, *residuals], frozen)
                logits = adapted.family.logits(run, batch)
            sums = adapted.family.sums(logits, labels, weight)
            gradients = torch.autograd.grad(sums.loss, pieces)
        found = (sums.loss, sums.weight, sums.correct, *clipped_sum(gradients, clip))
        return tuple(value.detach() for value in found)

    return step


def _weight_of_labels(task: Task, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what each label of a row weighs, (B,): a row of many counts as their mean."""
    match task:
        case TokenClassification():
            learned = labels != IGNORED_LABEL
        case CausalLanguageModelling():
            learned = labels[:, 1:] != IGNORED_LABEL  # nothing stands before the first one
        case TextClassification() | ArrayLearning():
            return weight
    return weight / learned.sum(1).clamp(min=1)


class RowParameters(TorchFunctionMode):
    """While it is active, layers take parameters that have a row axis before their own.

    Raises PlanExportError for an operation that has no such form: values of one row must never
    reach another's gradient.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__()
        self._parameters = {id(parameter) for parameter in parameters}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        given = (*args, *keywords.values())
        if not any(id(value) in self._parameters for value in given):
            return func(*args, **keywords)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # an attribute: dtype, device, shape
            return func(*args, **keywords)
        layer = _LAYERS.get(name)
        if layer is None:
            known = ", ".join(sorted(_LAYERS))
            raise PlanExportError(
                TRAIN_DP_GRAPH,
                f"expected trainable values in {known} only, found them in {name}: "
                "build the plan without it (--no-dp)",
            )
        return layer(*args, **keywords)


def for_each_row(pieces: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """Give each of `rows` rows its own values: (rows, *shape), leaves of the gradient."""
    return [piece[None].expand(rows, *piece.shape).detach().requires_grad_() for piece in pieces]


def clipped_sum(
    gradients: tuple[torch.Tensor, ...],  # of one tensor each, (B, *shape)
    clip: torch.Tensor,  # () float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the rows' gradients, each scaled to a norm of at most `clip`, (P,), and
    their norms before, (B,).
    """
    by_row = [gradient.flatten(1) for gradient in gradients]
    norms = torch.sqrt(sum((piece * piece).sum(1) for piece in by_row))  # type: ignore[arg-type]
    scale = torch.clamp(clip / (norms + _NO_DIVISION_BY_ZERO), max=1.0)
    return torch.cat([(scale[None] @ piece)[0] for piece in by_row]), norms


def _linear(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` of values (B, ..., in) with weight (B, out, in) and bias (B, out)."""
    between = values.shape[1:-1]
    flat = values[:, None] if values.dim() == 2 else values.flatten(1, -2)
    product = torch.bmm(flat, weight.transpose(1, 2))
    if bias is not None:
        product = product + bias[:, None]
    return product.reshape(values.shape[0], *between, weight.shape[1])


def _layer_norm(
    values: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`F.layer_norm` with weight and bias (B, *normalized_shape)."""
    normal = torch.nn.functional.layer_norm(values, normalized_shape, eps=eps)
    between = values.dim() - 1 - len(normalized_shape)
    shape = (values.shape[0], *(1,) * between, *normalized_shape)
    if weight is not None:
        normal = normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def _batch_norm(
    values: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`F.batch_norm` with weight and bias (B, C); networks are in evaluation mode."""
    normal = torch.nn.functional.batch_norm(
        values, running_mean, running_var, training=training, momentum=momentum, eps=eps
    )
    rest = (1,) * (values.dim() - 2)
    if weight is not None:
        normal = normal * weight.reshape(*weight.shape, *rest)
    return normal if bias is None else normal + bias.reshape(*bias.shape, *rest)


def _conv2d(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`F.conv2d` with weight (B, O, I, height, width) and bias (B, O): patches, then a product."""
    if groups != 1 or isinstance(padding, str):
        raise PlanExportError(
            TRAIN_DP_GRAPH,
            f"expected convolutions of one group and padding in numbers, found {groups} and "
            f"{padding}: build the plan without it (--no-dp)",
        )
    size = weight.shape[-2:]
    patches = torch.nn.functional.unfold(values, size, dilation, padding, stride)
    product = torch.bmm(weight.flatten(2), patches)  # (B, O, places)
    if bias is not None:
        product = product + bias[..., None]
    settings = zip(*(_pair(value) for value in (stride, padding, dilation)), strict=True)
    places = [
        (extent + 2 * pad - gap * (width - 1) - 1) // step + 1
        for extent, width, (step, pad, gap) in zip(values.shape[-2:], size, settings, strict=True)
    ]
    return product.reshape(*product.shape[:2], *places)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


_LAYERS: dict[str, Layer] = {
    "batch_norm": _batch_norm,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "linear": _linear,
}
