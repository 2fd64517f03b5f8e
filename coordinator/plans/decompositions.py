"""Backward operators that torch.onnx lacks or gets wrong, written as forward ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions

_aten = torch.ops.aten
_KNOWN = (
    _aten._log_softmax_backward_data,
    _aten._softmax_backward_data,
    _aten.elu_backward,
    _aten.embedding_dense_backward,
    _aten.gelu_backward,
    _aten.hardswish_backward,
    _aten.hardtanh_backward,
    _aten.leaky_relu_backward,
    _aten.max_pool2d_with_indices_backward,
    _aten.native_batch_norm_backward,
    _aten.native_dropout_backward,
    _aten.native_group_norm_backward,
    _aten.native_layer_norm_backward,
    _aten.nll_loss2d_backward,
    _aten.nll_loss2d_forward,
    _aten.nll_loss_backward,
    _aten.nll_loss_forward,  # torch.onnx gives it a wrong total weight
    _aten.select_backward,
    _aten.sigmoid_backward,
    _aten.silu_backward,
    _aten.slice_backward,
    _aten.smooth_l1_loss_backward,
    _aten.softplus_backward,
    _aten.tanh_backward,
    _aten.threshold_backward,
)
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what `make_fx` replaces, by operator."""
    return {
        **get_decompositions(_KNOWN),
        _aten.convolution_backward.default: _convolution_backward,
        _aten.avg_pool2d_backward.default: _average_pool_backward,
        _aten.pow.Tensor_Scalar: _power,
    }


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """Spare the power of 1 that the derivative of a square has: runtimes compute it."""
    if exponent != 1:
        return NotImplemented  # type: ignore[no-any-return] # make_fx's sign of "not this one"
    return base.clone()


def _convolution_backward(
    slope: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Gradients:
    """Return the gradients of input, weight and bias as two convolutions and a sum.

    `slope` (B, O, ...) is the loss's with respect to the result, `values` (B, I, ...) the input.
    """
    if transposed:
        return NotImplemented  # type: ignore[no-any-return] # make_fx's sign of "not this one"
    settings = (stride, padding, dilation, groups)
    return (
        _input_gradient(slope, values, weight, *settings) if wanted[0] else None,
        _weight_gradient(slope, values, weight, *settings) if wanted[1] else None,
        slope.sum([0, *range(2, slope.dim())]) if wanted[2] else None,
    )


def _input_gradient(
    slope: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    # A stride leaves out the last values that no window reaches: their gradient is 0.
    reached = [
        (slope.shape[axis + 2] - 1) * stride[axis]
        - 2 * padding[axis]
        + dilation[axis] * (weight.shape[axis + 2] - 1)
        + 1
        for axis in range(len(stride))
    ]
    rest = [values.shape[axis + 2] - extent for axis, extent in enumerate(reached)]
    gradient: torch.Tensor = _aten.convolution(
        slope, weight, None, stride, padding, dilation, True, rest, groups
    )
    return gradient


def _weight_gradient(
    slope: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Convolve the input with the slope: rows take the place of channels."""
    pieces = []
    for inputs, slopes in zip(values.chunk(groups, 1), slope.chunk(groups, 1), strict=True):
        whole = _aten.convolution(
            inputs.transpose(0, 1),
            slopes.transpose(0, 1),
            None,
            dilation,
            padding,
            stride,
            False,
            [0] * len(stride),
            1,
        )
        for axis in range(2, weight.dim()):
            whole = whole.narrow(axis, 0, weight.shape[axis])
        pieces.append(whole.transpose(0, 1))
    return torch.cat(pieces) if groups > 1 else pieces[0]


def _average_pool_backward(
    slope: torch.Tensor,
    values: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> torch.Tensor:
    """Spread each mean's slope evenly over its window."""
    if ceil_mode or (any(padding) and not count_include_pad):
        return NotImplemented  # type: ignore[no-any-return] # make_fx's sign of "not this one"
    kernel = [*kernel, *kernel][:2]
    stride = [*(stride or kernel), *(stride or kernel)][:2]
    padding = [*padding, *padding][:2]
    share = 1.0 / (divisor or kernel[0] * kernel[1])
    even = torch.full((slope.shape[1], 1, *kernel), share)
    channels = int(slope.shape[1])
    return _input_gradient(slope, values, even, stride, padding, [1, 1], channels)
