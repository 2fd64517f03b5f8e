"""What the converted graph still needs: no transposed weights, no traces of this machine, and
weights that lie in files beside it.
"""

import math
from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper

from coordinator.plans.request import PlanExportError
from fedloom.adapters import adapter_header
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH, GraphContract, Port
from fedloom.plans import ADAPTER_FILE, BASE_FILE, TrainableTensor

FROZEN = "frozen::"  # prefix of the inputs that become weights of base.safetensors
MAX_CONSTANT_BYTES = 16_384  # a constant in a graph is a shape or a mask, never a weight
_ELEMENTS = {"tensor(float)": TensorProto.FLOAT, "tensor(int64)": TensorProto.INT64}
_LABELLING = {"labels", "sample_weight"}
_WITHOUT_EXTENTS = {"theta", *_LABELLING}
_FIRST_AXIS_START = helper.make_attribute("start", 0)
_FIRST_AXIS_END = helper.make_attribute("end", 1)


def fold_transposes(graph: onnx.GraphProto) -> None:
    """Rewrite products with transposed matrices to `Gemm(transA, transB)`.

    ONNX Runtime would fold `Transpose(weight)` into a second copy of every frozen weight when it
    loads the graph.
    """
    ranks = _ranks(graph)
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "MatMul" and all(ranks.get(name) == 2 for name in node.input):
            flips = _take_transposes(node, producers)
            if any(flips):
                node.op_type = "Gemm"
                _set_transposes(node, flips)
        elif node.op_type == "Gemm":
            _set_transposes(node, _take_transposes(node, producers))


def read_extents_from_inputs(graph: onnx.GraphProto) -> None:
    """Make every node that asks labels or weights for an extent ask the first input for it.

    The tracer takes extents from any input, also from those that inference does not have.
    """
    inputs = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.input}
    source = next(name for name in inputs if name not in _WITHOUT_EXTENTS)
    for node in graph.node:
        if node.op_type != "Shape" or node.input[0] not in _LABELLING:
            continue
        if inputs[node.input[0]] == 1:  # (B,)
            _replace(node.attribute, [_FIRST_AXIS_START, _FIRST_AXIS_END])
            node.input[0] = source
        elif inputs[node.input[0]] == inputs[source]:  # (B, S), as the tokens
            node.input[0] = source


def keep_outputs(graph: onnx.GraphProto, spec: GraphContract) -> None:
    """Reduce a graph to what the outputs of `spec` need.

    Raises PlanExportError when they need an input that `spec` does not have.
    """
    _replace(graph.output, [output for output in graph.output if output.name in spec.outputs])
    needed = set(spec.outputs)
    kept = []
    for node in reversed(graph.node):  # nodes stand in topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            while node.output[-1] not in needed:  # what only the backward pass read
                del node.output[-1]
    _replace(graph.node, reversed(kept))
    _replace(graph.initializer, [t for t in graph.initializer if t.name in needed])
    _replace(graph.input, [i for i in graph.input if i.name in needed])
    inputs = {value.name for value in graph.input if not value.name.startswith(FROZEN)}
    if inputs != set(spec.inputs):
        expected, found = ", ".join(spec.inputs), ", ".join(sorted(inputs))
        raise PlanExportError(spec.file, f"expected the inputs {expected}, found {found}")


def normalise(model: onnx.ModelProto, spec: GraphContract) -> None:
    """Make equal graphs equal bytes: short names in order, stated shapes, no notes of any tool.

    Raises PlanExportError when the graph is not plain ONNX or carries a weight as a constant.
    """
    _check_plain(model, spec.file)
    frozen = [value for value in model.graph.input if value.name.startswith(FROZEN)]
    kept = {*spec.inputs, *spec.outputs, *(value.name for value in frozen)}
    names: dict[str, str] = {}
    for name in _value_names(model.graph):
        names[name] = name if name in kept else f"v{len(names)}"
    inputs = [_declared(name, port) for name, port in spec.inputs.items()]
    outputs = [_declared(name, port) for name, port in spec.outputs.items()]
    clean = helper.make_graph(
        [_plain_node(node, names) for node in model.graph.node],
        spec.file.removesuffix(".onnx"),
        inputs + [_plain_input(value) for value in frozen],
        outputs,
        [_plain_tensor(tensor, names) for tensor in model.graph.initializer],
    )
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    model.CopyFrom(helper.make_model(clean, opset_imports=[helper.make_opsetid("", opset)]))
    model.producer_name = "fedloom"


def used_weights(model: onnx.ModelProto) -> set[str]:
    """Return the names of the frozen weights that a graph uses."""
    names = (value.name for value in model.graph.input)
    return {name.removeprefix(FROZEN) for name in names if name.startswith(FROZEN)}


def attach_weights(
    model: onnx.ModelProto,
    frozen: tuple[TrainableTensor, ...],
    layout: tuple[TrainableTensor, ...],
) -> None:
    """Point every frozen input at its bytes in `base.safetensors`.

    Inference graphs also get theta from `adapter_model.safetensors`: an initializer that is an
    input too is a default, which a caller may override (ONNX IR >= 4).
    """
    graph = model.graph
    names = {tensor.name for tensor in frozen}
    for node in graph.node:
        node.input[:] = [name.removeprefix(FROZEN) for name in node.input]
    _replace(graph.input, [i for i in graph.input if not i.name.startswith(FROZEN)])
    start = len(adapter_header(frozen))
    used = {name for node in graph.node for name in node.input} & names
    for tensor in frozen:
        if tensor.name in used:
            where = (BASE_FILE, start + 4 * tensor.offset)
            graph.initializer.append(_external(tensor.name, tensor.shape, *where))
    if f"{graph.name}.onnx" in (INFER_GRAPH, GEN_GRAPH):
        count = layout[-1].offset + layout[-1].size
        where = (ADAPTER_FILE, len(adapter_header(layout)))
        graph.initializer.append(_external("theta", (count,), *where))


def _external(name: str, shape: tuple[int, ...], location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    length = 4 * math.prod(shape)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            ranks[value.name] = len(value.type.tensor_type.shape.dim)
    return ranks


def _take_transposes(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> list[bool]:
    """Read both factors from before their transposes; return which were transposed."""
    flips = []
    for index in (0, 1):
        name, flipped = node.input[index], False
        while (producer := producers.get(name)) is not None:
            transpose = producer.op_type == "Transpose" and list(_attribute(producer)) == [1, 0]
            if not transpose and producer.op_type != "Identity":
                break
            name, flipped = producer.input[0], flipped ^ transpose
        node.input[index] = name
        flips.append(flipped)
    return flips


def _attribute(transpose: onnx.NodeProto) -> Iterable[int]:
    return transpose.attribute[0].ints if transpose.attribute else ()


def _set_transposes(gemm: onnx.NodeProto, flips: list[bool]) -> None:
    for name, flipped in zip(("transA", "transB"), flips, strict=True):
        if not flipped:
            continue
        old = [attribute for attribute in gemm.attribute if attribute.name == name]
        value = 1 - (old[0].i if old else 0)
        for attribute in old:
            gemm.attribute.remove(attribute)
        gemm.attribute.append(helper.make_attribute(name, value))


def _check_plain(model: onnx.ModelProto, file: str) -> None:
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain})
    if foreign or model.functions:
        raise PlanExportError(file, f"expected plain ONNX operators, found {', '.join(foreign)}")
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > MAX_CONSTANT_BYTES or tensor.external_data:
            raise PlanExportError(
                file,
                f"expected constants of at most {MAX_CONSTANT_BYTES} bytes, found one of shape "
                f"{tuple(tensor.dims)}: a weight that the tracer took for a constant",
            )


def _value_names(graph: onnx.GraphProto) -> list[str]:
    """Every value's name, in the order of its first appearance; "" (absent) is none."""
    names = [value.name for value in graph.input]
    for node in graph.node:
        names += [*node.input, *node.output]
    return list(dict.fromkeys(name for name in names if name))


def _plain_node(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    plain = onnx.NodeProto(op_type=node.op_type)
    plain.input.extend(names.get(name, "") for name in node.input)
    plain.output.extend(names.get(name, "") for name in node.output)
    for attribute in sorted(node.attribute, key=lambda entry: entry.name):
        plain.attribute.add().CopyFrom(attribute)
        plain.attribute[-1].doc_string = ""
    return plain


def _plain_tensor(tensor: TensorProto, names: dict[str, str]) -> TensorProto:
    plain = TensorProto(name=names[tensor.name], data_type=tensor.data_type, dims=tensor.dims)
    plain.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
    return plain


def _declared(name: str, port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _ELEMENTS[port.type], port.axes)


def _plain_input(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape)


def _replace(field: object, values: Iterable[object]) -> None:
    """Replace the content of a repeated protobuf field."""
    kept = list(values)
    del field[:]  # type: ignore[attr-defined] # protobuf's repeated fields share no public type
    field.extend(kept)  # type: ignore[attr-defined]
