"""A merged graph with matrices of 8 bits: products by ONNX Runtime's quantiser, look-ups by rows.

Products are dynamic: what is multiplied is quantised at every run, and the integers are multiplied.
Tables that are looked up get a scale for each row; the quantiser would give them one for all.
"""

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from fedloom.tensor_files import Array

_SMALLEST = 1024  # values; a smaller table stays float32


def quantise_graph(path: Path, weights: dict[str, Array]) -> onnx.ModelProto:
    """Quantise a graph; its initializers go to `weights`, under names that no other graph's have.

    Weights are unsigned: with signed ones older x86 processors saturate in 16 bits, and answer
    otherwise than newer ones.
    """
    model = onnx.load(path)
    _look_up_rows(model.graph)
    _part_shared(model.graph)
    with tempfile.TemporaryDirectory(prefix="fedloom-int8-") as folder, _silence():
        quantize_dynamic(
            model,
            Path(folder) / path.name,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=True,
        )
        model = onnx.load(Path(folder) / path.name)
    _hand_over(model.graph, weights)
    return model


def _look_up_rows(graph: onnx.GraphProto) -> None:
    """Take rows of integers and of scales, and multiply."""
    tables = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        by_row = all(entry.i == 0 for entry in node.attribute if entry.name == "axis")
        if table is None or not by_row or table.dims[0] * table.dims[1] < _SMALLEST:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(table)
        scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)  # (N, 1)
        integers = np.rint(values / np.where(scales, scales, 1)).astype(np.int8)  # (N, K)
        name = f"{table.name}.rows.{node.name}"
        graph.initializer.append(numpy_helper.from_array(integers, name))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scale"))
        nodes += _lookup(node, name)
    del graph.node[:]
    graph.node.extend(nodes)


def _lookup(gather: onnx.NodeProto, name: str) -> list[onnx.NodeProto]:
    ids, node = gather.input[1], helper.make_node
    found = f"{gather.name}.integers", f"{gather.name}.floats", f"{gather.name}.scales"
    integers, floats, scales = found
    return [
        node("Gather", [name, ids], [integers], f"{integers}.node", axis=0),
        node("Cast", [integers], [floats], f"{floats}.node", to=TensorProto.FLOAT),
        node("Gather", [f"{name}.scale", ids], [scales], f"{scales}.node", axis=0),
        node("Mul", [floats, scales], list(gather.output), f"{gather.name}.node"),
    ]


def _part_shared(graph: onnx.GraphProto) -> None:
    """Give products weights of their own: the quantiser transposes what others may read as well."""
    uses = Counter(name for node in graph.node for name in node.input)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gemm":
            weight = node.input[1]
            if weight in tensors and uses[weight] > 1:
                copy = graph.initializer.add()
                copy.CopyFrom(tensors[weight])
                copy.name = node.input[1] = f"{weight}.of.{node.name}"
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep back the quantiser's advice, which goes to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _hand_over(graph: onnx.GraphProto, weights: dict[str, Array]) -> None:
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        values, name = numpy_helper.to_array(tensor), tensor.name
        while name in weights and not _equal(weights[name], values):
            name += "_"
        weights[name] = values
        renamed[tensor.name] = name
        tensor.name = name
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _equal(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
