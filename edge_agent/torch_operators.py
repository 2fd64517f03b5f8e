"""Plain ONNX operators as torch functions, differentiable wherever torch's are.

Semantics: the ONNX operator schemas, opset 13 to 21. Graphs come from strangers: an attribute that
a function here does not know is refused when the graph is loaded, never ignored.

Inputs listed in STRUCTURAL say how, not what: shapes, axes, bounds. They are kept on the CPU, so
that reading them does not wait for an accelerator.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Attributes = Mapping[str, Any]
Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Operator:
    """`function(attributes, *inputs)`; an input that is left out is None."""

    function: Function
    attributes: frozenset[str] = frozenset()
    structural: frozenset[int] = frozenset()  # positions of inputs


OPERATORS: dict[str, Operator] = {}

_ALL = frozenset(range(8))
# ONNX's numbers of element types; int8 and uint8 are the ones of quantised weights.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _operator(
    *names: str, attributes: str = "", structural: Sequence[int] | frozenset[int] = ()
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = Operator(
                function, frozenset(attributes.split()), frozenset(structural)
            )
        return function

    return register


def _plain(function: Callable[..., Tensor]) -> Function:
    """Take a function of tensors alone for one that is given attributes."""
    return lambda attributes, *inputs: function(*inputs)


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "And": torch.logical_and,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mish": functional.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,  # both to even
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Add": torch.add,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
for _name, _function in _PLAIN.items():
    OPERATORS[_name] = Operator(_plain(_function))


@_operator("Sum")
def _sum(_: Attributes, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = first + other
    return first


@_operator("Div")
def _divide(_: Attributes, x: Tensor, y: Tensor) -> Tensor:
    floating = x.is_floating_point() or y.is_floating_point()
    return torch.div(x, y, rounding_mode=None if floating else "trunc")


@_operator("Mod", attributes="fmod")
def _modulo(attributes: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if attributes.get("fmod", 0) else torch.remainder(x, y)


@_operator("Pow")
def _power(_: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


@_operator("Max")
def _maximum(_: Attributes, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.maximum(first, other)
    return first


@_operator("Min")
def _minimum(_: Attributes, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.minimum(first, other)
    return first


@_operator("Clip")
def _clip(_: Attributes, x: Tensor, low: Tensor | None = None, top: Tensor | None = None) -> Tensor:
    return x if low is None and top is None else torch.clamp(x, low, top)


@_operator("Elu", attributes="alpha")
def _elu(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.elu(x, attributes.get("alpha", 1.0))


@_operator("LeakyRelu", attributes="alpha")
def _leaky_relu(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, attributes.get("alpha", 0.01))


@_operator("HardSigmoid", attributes="alpha beta")
def _hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return torch.clamp(x * alpha + beta, 0, 1)


@_operator("Gelu", attributes="approximate")
def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=attributes.get("approximate", b"none").decode())


@_operator("Cast", attributes="to saturate")
def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    return x.to(DTYPES[attributes["to"]])


@_operator("CastLike", attributes="saturate")
def _cast_like(_: Attributes, x: Tensor, target: Tensor) -> Tensor:
    return x.to(target.dtype)


@_operator("Softmax", attributes="axis")
def _softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.softmax(x, attributes.get("axis", -1))


@_operator("LogSoftmax", attributes="axis")
def _log_softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.log_softmax(x, attributes.get("axis", -1))


@_operator("Dropout", attributes="seed", structural=[1, 2])
def _dropout(
    _: Attributes, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Tensor:
    if training is not None and bool(training):
        raise ValueError("expected Dropout outside of training mode")
    return x


# Shapes.


@_operator("Shape", attributes="start end")
def _shape(attributes: Attributes, x: Tensor) -> Tensor:
    start, end = attributes.get("start", 0), attributes.get("end", x.dim())
    return torch.tensor(x.shape[slice(start, end)], dtype=torch.int64)


@_operator("Size")
def _size(_: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@_operator("Reshape", attributes="allowzero", structural=[1])
def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    extents = shape.tolist()
    if not attributes.get("allowzero", 0):
        extents = [extent or x.shape[axis] for axis, extent in enumerate(extents)]
    return x.reshape(extents)


@_operator("Flatten", attributes="axis")
def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@_operator("Squeeze", structural=[1])
def _squeeze(_: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


@_operator("Unsqueeze", structural=[1])
def _unsqueeze(_: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in axes.reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


@_operator("Transpose", attributes="perm")
def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(attributes.get("perm", tuple(reversed(range(x.dim())))))


@_operator("Expand", structural=[1])
def _expand(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    extents = [1] * (x.dim() - shape.numel()) + shape.tolist()
    own = [1] * (len(extents) - x.dim()) + list(x.shape)
    return x.expand([a if b == 1 else b for a, b in zip(own, extents, strict=True)])


@_operator("Tile", structural=[1])
def _tile(_: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@_operator("Concat", attributes="axis")
def _concat(attributes: Attributes, *parts: Tensor) -> Tensor:
    return torch.cat(parts, attributes["axis"])


@_operator("Split", attributes="axis num_outputs", structural=[1])
def _split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(x, sizes.tolist(), axis)
    return torch.split(x, -(-x.shape[axis] // attributes["num_outputs"]), axis)


@_operator("Slice", structural=[1, 2, 3, 4])
def _slice(
    _: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    count = starts.numel()
    which = range(count) if axes is None else axes.tolist()
    strides = [1] * count if steps is None else steps.tolist()
    for axis, start, end, stride in zip(
        which, starts.tolist(), ends.tolist(), strides, strict=True
    ):
        bounds = slice(start, end, stride).indices(x.shape[axis])
        if stride > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(*bounds),)]
        else:
            chosen = torch.tensor(range(*bounds), dtype=torch.int64, device=x.device)
            x = x.index_select(axis, chosen)
    return x


@_operator("Pad", attributes="mode", structural=[1, 3])
def _pad(
    attributes: Attributes,
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    amounts = pads.tolist()
    half = len(amounts) // 2
    which = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    by_axis = {axis: (amounts[i], amounts[half + i]) for i, axis in enumerate(which)}
    pairs = [by_axis.get(axis, (0, 0)) for axis in reversed(range(x.dim()))]
    flat = [amount for pair in pairs for amount in pair]
    mode = attributes.get("mode", b"constant").decode()
    if mode == "constant":
        return functional.pad(x, flat, value=0.0 if value is None else float(value))
    while len(flat) > 2 and flat[-2:] == [0, 0]:  # torch pads the last axes alone in these modes
        del flat[-2:]
    return functional.pad(x, flat, mode={"edge": "replicate"}.get(mode, mode))


@_operator("Range", structural=_ALL)
def _range(_: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@_operator("ConstantOfShape", attributes="value", structural=[0])
def _constant_of_shape(attributes: Attributes, shape: Tensor) -> Tensor:
    value: Tensor = attributes.get("value", torch.zeros(1))
    return torch.full(shape.tolist(), value.item(), dtype=value.dtype)


@_operator("Trilu", attributes="upper", structural=[1])
def _triangle(attributes: Attributes, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    k = 0 if diagonal is None else int(diagonal)
    return torch.triu(x, k) if attributes.get("upper", 1) else torch.tril(x, k)


# Choosing by index.


def _from_start(indices: Tensor, extent: int) -> Tensor:
    """Count negative indices from the start."""
    return torch.where(indices < 0, indices + extent, indices).long()


@_operator("Gather", attributes="axis")
def _gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    chosen = x.index_select(axis, _from_start(indices, x.shape[axis]).reshape(-1))
    return chosen.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@_operator("GatherElements", attributes="axis")
def _gather_elements(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0)
    return torch.gather(x, axis, _from_start(indices, x.shape[axis]))


@_operator("GatherND", attributes="batch_dims")
def _gather_nd(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    shared = attributes.get("batch_dims", 0)
    depth = indices.shape[-1]
    places: list[Tensor] = []
    for axis in range(shared):  # every batch chooses in itself
        extents = [1] * (indices.dim() - 1)
        extents[axis] = x.shape[axis]
        places.append(torch.arange(x.shape[axis], device=x.device).reshape(extents))
    places += [_from_start(indices[..., i], x.shape[shared + i]) for i in range(depth)]
    return x[tuple(places)]


@_operator("ScatterElements", attributes="axis reduction")
def _scatter_elements(
    attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor
) -> Tensor:
    axis = attributes.get("axis", 0)
    places = _from_start(indices, x.shape[axis])
    reduction = attributes.get("reduction", b"none").decode()
    if reduction == "none":
        return x.scatter(axis, places, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, places, updates, names[reduction])


@_operator("ScatterND", attributes="reduction")
def _scatter_nd(attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    reduction = attributes.get("reduction", b"none").decode()
    if reduction not in ("none", "add"):
        raise ValueError(f"expected ScatterND that replaces or adds, found {reduction}")
    places = tuple(_from_start(indices[..., i], x.shape[i]) for i in range(indices.shape[-1]))
    return x.index_put(places, updates, accumulate=reduction == "add")


@_operator("OneHot", attributes="axis", structural=[1])
def _one_hot(attributes: Attributes, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    extent = int(depth)
    classes = torch.arange(extent, device=indices.device)
    hot = _from_start(indices, extent)[..., None] == classes
    off, on = values
    return torch.where(hot, on, off).movedim(-1, attributes.get("axis", -1))


@_operator("NonZero")
def _non_zero(_: Attributes, x: Tensor) -> Tensor:
    return torch.nonzero(x).T


@_operator("ArgMax", attributes="axis keepdims select_last_index")
def _arg_max(attributes: Attributes, x: Tensor) -> Tensor:
    return _arg(torch.argmax, attributes, x)


@_operator("ArgMin", attributes="axis keepdims select_last_index")
def _arg_min(attributes: Attributes, x: Tensor) -> Tensor:
    return _arg(torch.argmin, attributes, x)


def _arg(function: Callable[..., Tensor], attributes: Attributes, x: Tensor) -> Tensor:
    if attributes.get("select_last_index", 0):
        raise ValueError("expected the first of equal extremes, found a graph that wants the last")
    return function(x, attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@_operator("TopK", attributes="axis largest sorted", structural=[1])
def _top_k(attributes: Attributes, x: Tensor, count: Tensor) -> Sequence[Tensor]:
    largest, in_order = (bool(attributes.get(name, 1)) for name in ("largest", "sorted"))
    return torch.topk(x, int(count), attributes.get("axis", -1), largest, in_order)


@_operator("CumSum", attributes="exclusive reverse", structural=[1])
def _cumulative_sum(attributes: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis)
    source = x.flip(along) if attributes.get("reverse", 0) else x
    total = torch.cumsum(source, along, dtype=x.dtype)
    if attributes.get("exclusive", 0):
        total = total - source
    return total.flip(along) if attributes.get("reverse", 0) else total


# Sums over axes.


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    def reduce(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        which = attributes.get("axes", ()) if axes is None else axes.tolist()
        if not which:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            which = range(x.dim())
        return function(x, list(which), bool(attributes.get("keepdims", 1)))

    known = frozenset(("axes", "keepdims", "noop_with_empty_axes"))
    OPERATORS[name] = Operator(reduce, known, frozenset((1,)))


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


_reduction("ReduceSum", lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype))
_reduction("ReduceMean", lambda x, axes, keep: torch.mean(x, axes, keep))
_reduction("ReduceMax", lambda x, axes, keep: torch.amax(x, axes, keep))
_reduction("ReduceMin", lambda x, axes, keep: torch.amin(x, axes, keep))
_reduction("ReduceProd", _product)
_reduction("ReduceL1", lambda x, axes, keep: torch.sum(x.abs(), axes, keep, dtype=x.dtype))
_reduction("ReduceL2", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep))
_reduction("ReduceSumSquare", lambda x, axes, keep: torch.sum(x * x, axes, keep, dtype=x.dtype))
_reduction("ReduceLogSumExp", lambda x, axes, keep: torch.logsumexp(x, axes, keep))


# Layers.


@_operator("Gemm", attributes="alpha beta transA transB")
def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if c is not None:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    product = a @ b
    return product if alpha == 1.0 else product * alpha


@_operator("Einsum", attributes="equation")
def _einsum(attributes: Attributes, *factors: Tensor) -> Tensor:
    return torch.einsum(attributes["equation"].decode(), *factors)


@_operator("LayerNormalization", attributes="axis epsilon stash_type")
def _layer_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    shape = x.shape[attributes.get("axis", -1) % x.dim() :]
    bias = None if bias is None else bias.expand(shape)
    return functional.layer_norm(
        x, shape, scale.expand(shape), bias, attributes.get("epsilon", 1e-5)
    )


@_operator("InstanceNormalization", attributes="epsilon")
def _instance_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    epsilon = attributes.get("epsilon", 1e-5)
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@_operator("BatchNormalization", attributes="epsilon momentum training_mode")
def _batch_norm(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    if attributes.get("training_mode", 0):
        raise ValueError("expected BatchNormalization outside of training mode")
    epsilon = attributes.get("epsilon", 1e-5)
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


_WINDOW = "auto_pad dilations kernel_shape pads strides"


@_operator("Conv", attributes=f"{_WINDOW} group")
def _convolution(
    attributes: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None
) -> Tensor:
    axes = w.dim() - 2
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
    strides, dilations = _per_axis(attributes, axes)
    padded = _padded(attributes, x, axes, 0.0)
    return function(padded, w, bias, strides, 0, dilations, attributes.get("group", 1))


@_operator("MaxPool", attributes=f"{_WINDOW} ceil_mode storage_order")
def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    axes = len(attributes["kernel_shape"])
    strides, dilations = _per_axis(attributes, axes)
    if attributes.get("ceil_mode", 0):
        raise ValueError("expected pooling of whole windows")
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[axes - 1]
    padded = _padded(attributes, x, axes, -math.inf)
    return pool(padded, attributes["kernel_shape"], strides, 0, dilations)


@_operator("AveragePool", attributes=f"{_WINDOW} ceil_mode count_include_pad")
def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    strides, dilations = _per_axis(attributes, len(kernel))
    padding = any(attributes.get("pads", ())) and not attributes.get("count_include_pad", 0)
    if padding or attributes.get("ceil_mode", 0) or any(extent != 1 for extent in dilations):
        raise ValueError("expected pooling of whole windows")
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    return pool(_padded(attributes, x, len(kernel), 0.0), kernel, strides)


@_operator("GlobalAveragePool")
def _global_average(_: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@_operator("GlobalMaxPool")
def _global_max(_: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def _per_axis(attributes: Attributes, axes: int) -> tuple[list[int], list[int]]:
    """Return strides and dilations."""
    ones = [1] * axes
    return list(attributes.get("strides", ones)), list(attributes.get("dilations", ones))


def _padded(attributes: Attributes, x: Tensor, axes: int, value: float) -> Tensor:
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ValueError(f"expected stated pads, found {attributes['auto_pad']!r}")
    pads = list(attributes.get("pads", [0] * (2 * axes)))
    if not any(pads):
        return x
    flat = [pads[side * axes + axis] for axis in reversed(range(axes)) for side in (0, 1)]
    return functional.pad(x, flat, value=value)


@_operator("DequantizeLinear", attributes="axis block_size")
def _dequantize(
    attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)

    def spread(values: Tensor) -> Tensor:
        if block:
            return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
        if values.dim() == 0 or values.numel() == 1:
            return values.reshape(())
        extents = [1] * x.dim()
        extents[axis] = -1
        return values.reshape(extents)

    steps = x.to(scale.dtype)
    if zero_point is not None:
        steps = steps - spread(zero_point.to(scale.dtype))
    return steps * spread(scale)
