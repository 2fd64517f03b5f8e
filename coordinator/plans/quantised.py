"""A base of small integers: matrices stored in 8 or 4 bits, made float where they are used.

Every use has a DequantizeLinear of its own, over the same bytes under another name: one that is
shared by the forward and the backward pass would keep a float copy of every weight alive through
the step. Rows of embeddings are looked up as integers, then scaled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from coordinator.plans.base_file import Base, lay_out
from coordinator.plans.model import AdaptedModel
from coordinator.plans.onnx_rewrite import ALIAS, FROZEN
from fedloom.errors import ConfigError
from fedloom.plans import BaseStorage
from fedloom.quantisation import (
    BLOCK,
    SCALE_SUFFIX,
    dequantise_blocks,
    dequantise_rows,
    quantise_blocks,
    quantise_rows,
)

SMALLEST = 1024  # values; a smaller matrix stays float32
OPSET_INT4, IR_INT4 = 21, 10  # the first with 4-bit types
_NEVER = ("lora_",)  # LoRA's own matrices are small, and a frozen A is multiplied by a trained B


@dataclass(frozen=True)
class Matrix:
    """A quantised weight (N, K): `integers` as they are stored, and their scales."""

    element: int  # ONNX's type: INT8, scales (N,), or INT4, scales (N, K / BLOCK)
    shape: tuple[int, int]
    integers: NDArray[Any]
    scales: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """What the graphs compute with."""
        if self.element == TensorProto.INT8:
            return dequantise_rows(self.integers, self.scales)
        return dequantise_blocks(self.integers, self.scales)


def quantise(
    adapted: AdaptedModel, graphs: dict[str, onnx.ModelProto], storage: BaseStorage, used: set[str]
) -> Base:
    """Quantise the frozen matrices of model and graphs; return the file that the graphs need.

    The model keeps the values that the graphs will compute with, so that both stay comparable.
    Raises ConfigError for a model without frozen matrices.
    """
    looked_up = {name for graph in graphs.values() for name in _looked_up(graph)}
    matrices: dict[str, Matrix] = {}
    floats: list[tuple[str, int, tuple[int, ...], NDArray[Any]]] = []
    for name, weight in zip(adapted.frozen_names, adapted.frozen_tensors(), strict=True):
        if name not in used:
            continue
        values = weight.numpy()
        if values.ndim != 2 or values.size < SMALLEST or any(part in name for part in _NEVER):
            floats.append((name, TensorProto.FLOAT, values.shape, values.astype("<f4", copy=False)))
            continue
        four_bits = storage is BaseStorage.INT4 and values.shape[1] % BLOCK == 0
        matrices[name] = _quantised(values, four_bits and name not in looked_up)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(matrices[name].values))
    if not matrices:
        raise ConfigError("base", f"expected frozen matrices of {SMALLEST} values, found none")
    for graph in graphs.values():
        _rewrite(graph, matrices)
    return _file(matrices, floats)


def _quantised(values: NDArray[np.float32], four_bits: bool) -> Matrix:
    rows, columns = values.shape
    integers, scales = quantise_blocks(values) if four_bits else quantise_rows(values)
    element = TensorProto.INT4 if four_bits else TensorProto.INT8
    return Matrix(element, (rows, columns), integers, scales)


def _file(
    matrices: dict[str, Matrix], floats: list[tuple[str, int, tuple[int, ...], NDArray[Any]]]
) -> Base:
    """Floats first: they are aligned then, whatever the integers' lengths."""
    scales = [
        (name + SCALE_SUFFIX, TensorProto.FLOAT, m.scales.shape, m.scales)
        for name, m in matrices.items()
    ]
    integers = [(name, m.element, m.shape, m.integers) for name, m in matrices.items()]
    return lay_out([*floats, *scales, *integers])


def _looked_up(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the weights whose rows are taken by index."""
    for node in model.graph.node:
        if _is_lookup(node) and node.input[0].startswith(FROZEN):
            yield node.input[0].removeprefix(FROZEN)


def _is_lookup(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and all(a.i == 0 for a in node.attribute if a.name == "axis")


def _rewrite(model: onnx.ModelProto, matrices: dict[str, Matrix]) -> None:
    """Read the matrices as integers; their inputs stay loose, one for each use."""
    graph = model.graph
    uses = dict.fromkeys(matrices, 0)
    inputs = [i for i in graph.input if i.name.removeprefix(FROZEN) not in matrices]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for index, value in enumerate(node.input):
            name = value.removeprefix(FROZEN)
            if not value.startswith(FROZEN) or name not in matrices:
                continue
            uses[name] += 1
            matrix, use = matrices[name], _Use(name, uses[name])
            lookup = _is_lookup(node) and index == 0
            inputs += use.inputs(matrix, lookup)
            if lookup:
                nodes += use.lookup(node)
                break
            nodes.append(use.dequantised(matrix))
            node.input[index] = use.value
        else:
            nodes.append(node)
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    if any(m.element == TensorProto.INT4 for m in matrices.values()):
        # Nothing that the exporter writes at opset 18 means another thing at 21.
        model.opset_import[0].version, model.ir_version = OPSET_INT4, IR_INT4


@dataclass(frozen=True)
class _Use:
    """One reading of a weight: names of its own for the same bytes."""

    name: str
    number: int

    @property
    def integers(self) -> str:
        return f"{FROZEN}{self.name}{ALIAS}{self.number}"

    @property
    def scales(self) -> str:
        return f"{FROZEN}{self.name}{SCALE_SUFFIX}{ALIAS}{self.number}"

    @property
    def value(self) -> str:
        return f"{self.name}{ALIAS}{self.number}.float"

    def inputs(self, matrix: Matrix, lookup: bool) -> list[onnx.ValueInfoProto]:
        """Declare both; scales that are looked up have a last axis, like the rows."""
        shape = (matrix.shape[0], 1) if lookup else matrix.scales.shape
        return [
            helper.make_tensor_value_info(self.integers, matrix.element, matrix.shape),
            helper.make_tensor_value_info(self.scales, TensorProto.FLOAT, shape),
        ]

    def dequantised(self, matrix: Matrix) -> onnx.NodeProto:
        read = [self.integers, self.scales]
        if matrix.element == TensorProto.INT8:
            return helper.make_node("DequantizeLinear", read, [self.value], axis=0)
        return helper.make_node("DequantizeLinear", read, [self.value], axis=1, block_size=BLOCK)

    def lookup(self, gather: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Take rows of integers and of scales, and multiply."""
        row, scale = f"{self.value}.row", f"{self.value}.row_scale"
        indices = gather.input[1]
        return [
            helper.make_node("Gather", [self.integers, indices], [f"{row}.integers"], axis=0),
            helper.make_node("Cast", [f"{row}.integers"], [row], to=TensorProto.FLOAT),
            helper.make_node("Gather", [self.scales, indices], [scale], axis=0),
            helper.make_node("Mul", [row, scale], list(gather.output)),
        ]
