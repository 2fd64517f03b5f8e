"""Backward operators that torch.onnx lacks or gets wrong, written as forward ones."""

from collections.abc import Callable
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
    _aten.native_layer_norm_backward,
    _aten.nll_loss_backward,
    _aten.nll_loss_forward,  # torch.onnx gives it a wrong total weight
    _aten.select_backward,
    _aten.sigmoid_backward,
    _aten.silu_backward,
    _aten.slice_backward,
    _aten.tanh_backward,
    _aten.threshold_backward,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what `make_fx` replaces, by operator."""
    return dict(get_decompositions(_KNOWN))
