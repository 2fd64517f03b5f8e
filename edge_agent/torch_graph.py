"""A plan's graph as torch executes it: ONNX nodes one after another, with torch's autograd.

Where a value lives is decided when the graph is loaded. What says how (shapes, axes) stays on the
CPU; constants that meet values of the device are copied there once; the frozen weights are mapped
from their file, and copied to an accelerator once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from torch import Tensor

from edge_agent.torch_operators import DTYPES, OPERATORS, Operator
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import FoundPort, GraphContract, check_session
from fedloom.plans import Plan

MIN_OPSET, MAX_OPSET = 13, 21  # within them the functions of `torch_operators` hold
_TYPE_NAMES = {1: "tensor(float)", 7: "tensor(int64)"}  # as contracts call them
_PACKED = frozenset((onnx.TensorProto.INT4, onnx.TensorProto.UINT4))
_MEASURES = frozenset(("Shape", "Size"))  # of a value anywhere they give one on the CPU

# What torch and Python raise for values that an operation cannot take.
TORCH_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class _Node:
    """An operation: values by name in, values by name out; "" is an input that is left out."""

    type: str
    operator: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    moved: tuple[int, ...]  # inputs that come from the CPU and are used on the device
    dropped: tuple[str, ...]  # values that nothing reads afterwards


class TorchGraph:
    """One loaded graph on one device; dropping the object gives its memory back."""

    def __init__(
        self, folder: Path, plan: Plan, contract: GraphContract, device: torch.device
    ) -> None:
        """Load the graph; Refused(PLAN_UNSUPPORTED) when it cannot be or breaks the contract."""
        self._file = contract.file
        self._device = device
        graph = _read(folder, contract.file)
        check_session(_Ports(graph), contract)
        self._outputs = {port.name: port.type.tensor_type for port in graph.output}
        weights = _Weights(folder, plan, contract.file)
        self._values: dict[str, Tensor] = {}  # what is there before every run
        on_cpu: set[str] = set()
        for entry in graph.initializer:
            if entry.data_location == onnx.TensorProto.EXTERNAL:
                self._values[entry.name] = weights.tensor(entry).to(device)
            else:
                self._values[entry.name] = _constant(entry)
                on_cpu.add(entry.name)
        self._nodes = self._placed(graph, on_cpu)

    def run(
        self, outputs: Sequence[str], inputs: Mapping[str, Tensor], failure: Reason
    ) -> list[Tensor]:
        """Return the named outputs; refuse with `failure` when an operation cannot be done."""
        values = {**self._values, **inputs}
        for node in self._nodes:
            arguments = [values[name] if name else None for name in node.inputs]
            for index in node.moved:
                arguments[index] = values[node.inputs[index]].to(self._device, non_blocking=True)
            try:
                results = node.operator.function(node.attributes, *arguments)
            except TORCH_ERRORS as error:
                raise Refused(
                    failure,
                    f"expected {self._file} to run, found torch's {type(error).__name__} "
                    f"in {node.type}",
                ) from error
            if isinstance(results, Tensor):
                results = (results,)
            # Outputs beyond these are left out by whoever made the graph.
            values.update(zip(node.outputs, results, strict=False))
            for name in node.dropped:
                del values[name]
        return [self._declared(name, values[name]) for name in outputs]

    def _declared(self, name: str, found: Tensor) -> Tensor:
        """Return an output in its declared type; torch has looked at no declaration so far."""
        rank = len(self._outputs[name].shape.dim)
        if found.dim() != rank:
            raise _refused(f"{self._file} to give {name} of {rank} axes", found.dim())
        return found.to(DTYPES[self._outputs[name].elem_type])

    def _placed(self, graph: onnx.GraphProto, on_cpu: set[str]) -> tuple[_Node, ...]:
        """Return the nodes; puts constants where they are used, into `_values`."""
        known = {*self._values, *(port.name for port in graph.input)}
        kept = known | set(self._outputs)
        nodes = []
        for node, last_read in zip(graph.node, _last_reads(graph), strict=True):
            operator, attributes = read_operator(node, self._file)
            given = [name for name in node.input if name]
            _require(known.issuperset(given), self._file, node, "an input that nothing gives")
            known.update(node.output)
            inputs, moved = list(node.input), []
            if node.op_type in _MEASURES or on_cpu.issuperset(given):
                on_cpu.update(node.output)
            elif self._device.type != "cpu":
                for index, name in enumerate(inputs):
                    if name not in on_cpu or index in operator.structural:
                        continue
                    if name in self._values:
                        inputs[index] = self._copied(name)
                    else:
                        moved.append(index)
            dropped = tuple(name for name in last_read if name not in kept)
            nodes.append(
                _Node(
                    node.op_type,
                    operator,
                    attributes,
                    tuple(inputs),
                    tuple(node.output),
                    tuple(moved),
                    dropped,
                )
            )
        missing = set(self._outputs) - known
        if missing:
            raise _refused(f"{self._file} to give {min(missing)}", "nothing")
        return tuple(nodes)

    def _copied(self, name: str) -> str:
        """Return the name of a constant's copy on the device."""
        copy = f"{name} on the device"  # no name that ONNX allows
        if copy not in self._values:
            self._values[copy] = self._values[name].to(self._device)
        return copy


class _Weights:
    """External data of a graph: members of the plan, mapped, so that nothing is read twice."""

    def __init__(self, folder: Path, plan: Plan, file: str) -> None:
        self._folder = folder
        self._members = {member.name for member in plan.members}
        self._file = file
        self._mapped: dict[str, Tensor] = {}  # (bytes,) uint8 by member

    def tensor(self, entry: onnx.TensorProto) -> Tensor:
        """Return a weight as a view of its file."""
        where = {pair.key: pair.value for pair in entry.external_data}
        name = where.get("location", "")
        if name not in self._members:
            raise _refused(f"{self._file} with weights in members of its plan", repr(name[:64]))
        try:
            mapped = self._map(name)
            start, length = int(where.get("offset", "0")), int(where["length"])
            if start < 0 or length < 0 or start + length > len(mapped):
                raise ValueError(f"bytes {start} to {start + length} of {len(mapped)}")
            found = mapped[start : start + length]
            if entry.data_type in _PACKED:
                found = _unpacked(found, entry.data_type)[: math.prod(entry.dims)]
            else:
                found = found.view(DTYPES[entry.data_type])
            return found.reshape(tuple(entry.dims))
        except TORCH_ERRORS as error:
            what = f"{self._file} with its weight {entry.name[:64]!r} in {name}"
            raise _refused(what, type(error).__name__) from error

    def _map(self, name: str) -> Tensor:
        if name not in self._mapped:
            # Copy on write: torch knows no tensors that must not be written to. Nothing writes.
            mapped = np.memmap(self._folder / name, np.uint8, "c")
            self._mapped[name] = torch.from_numpy(mapped)
        return self._mapped[name]


def _unpacked(pairs: Tensor, data_type: int) -> Tensor:
    """Return 4-bit values, the low half of each byte first, in 8 bits: torch has no such type."""
    halves = torch.stack((pairs & 15, pairs >> 4), -1).reshape(-1)
    if data_type == onnx.TensorProto.UINT4:
        return halves
    signed = halves.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed)


def _read(folder: Path, file: str) -> onnx.GraphProto:
    try:
        model = onnx.load_model(folder / file, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise _refused(f"onnx {onnx.__version__} to load {file}", type(error).__name__) from error
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", 0)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise _refused(f"{file} in opset {MIN_OPSET} to {MAX_OPSET}", opset)
    unknown = sorted({node.op_type for node in model.graph.node if not _known(node)})
    if unknown:
        raise _refused(f"{file} of operators that the torch engine has", ", ".join(unknown)[:200])
    return model.graph


def _known(node: onnx.NodeProto) -> bool:
    return not node.domain and (node.op_type in OPERATORS or node.op_type == "Constant")


@dataclass
class _Port:
    """A FoundPort."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class _Ports:
    """A LoadedGraph: what a graph declares."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._defaults = {entry.name for entry in graph.initializer}

    def get_inputs(self) -> Sequence[FoundPort]:
        """See LoadedGraph."""
        return [_port(port) for port in self._graph.input if port.name not in self._defaults]

    def get_overridable_initializers(self) -> Sequence[FoundPort]:
        """See LoadedGraph."""
        return [_port(port) for port in self._graph.input if port.name in self._defaults]

    def get_outputs(self) -> Sequence[FoundPort]:
        """See LoadedGraph."""
        return [_port(port) for port in self._graph.output]


def _port(port: onnx.ValueInfoProto) -> FoundPort:
    tensor = port.type.tensor_type
    name = _TYPE_NAMES.get(tensor.elem_type, f"element type {tensor.elem_type}")
    extents = [
        axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None
        for axis in tensor.shape.dim
    ]
    return _Port(port.name, name, extents)


def read_operator(node: onnx.NodeProto, file: str) -> tuple[Operator, dict[str, Any]]:
    """Return what a node does; raises Refused(PLAN_UNSUPPORTED) for an unknown attribute."""
    attributes = {entry.name: _attribute(entry) for entry in node.attribute}
    if node.op_type == "Constant":
        (value,) = attributes.values() or (None,)
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return Operator(lambda _: tensor), {}
    operator = OPERATORS[node.op_type]
    unknown = sorted(set(attributes) - operator.attributes)
    _require(not unknown, file, node, f"attribute {', '.join(unknown)[:64]}")
    return operator, attributes


def _attribute(entry: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(entry)
    return _constant(value) if isinstance(value, onnx.TensorProto) else value


def _constant(entry: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(entry)
    if entry.data_type in _PACKED:
        array = array.astype(np.int8)  # holds both kinds of 4 bits
    return torch.from_numpy(array.copy())


def _last_reads(graph: onnx.GraphProto) -> Iterable[list[str]]:
    """Return for every node the values that no later node reads."""
    read: set[str] = {""}
    found = []
    for node in reversed(graph.node):
        names = dict.fromkeys([*node.input, *node.output])
        found.append([name for name in names if name not in read])
        read.update(names)
    return reversed(found)


def _require(condition: bool, file: str, node: onnx.NodeProto, found: str) -> None:
    if not condition:
        raise _refused(f"{file} with a {node.op_type} that the torch engine can do", found)


def _refused(what: str, found: object) -> Refused:
    return Refused(Reason.PLAN_UNSUPPORTED, f"expected {what}, found {found}")
