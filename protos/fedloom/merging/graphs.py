"""One inference graph with theta folded into its weights.

The rewriting needs no pattern of any model. theta is followed as indices through whatever only
rearranges it, which tells for every value which trained tensor it is. LoRA's B is then taken for
zero and the zero followed: it vanishes where it is added to the adapted layer's own product, and
the weight of that product gets (alpha / rank) B A instead (Hu et al., arXiv:2106.09685v2, section
4.1). Whatever does not go this way is refused, and `comparison` looks at the outcome.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan, Role, TrainableTensor
from fedloom.tensor_files import Array

_REARRANGING = {"Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_KEEPING_ZERO = {"Cast", *_REARRANGING}
_CONSTANT = {"Constant", "DequantizeLinear"}  # with constant inputs
_PRODUCTS = {"Gemm", "MatMul"}
_PEFT_PREFIX = "base_model.model."

Indices = NDArray[np.int64]  # into theta


@dataclass
class Merging:
    """What the graphs of one plan share while they are merged: the weights they end up with."""

    plan: Plan
    theta: Theta
    weights: dict[str, Array] = field(default_factory=dict)  # of the merged graphs, by name
    merged: dict[tuple[str, str], Array] = field(default_factory=dict)  # by weight and LoRA's B

    def slice(self, tensor: TrainableTensor) -> Array:
        """Return a trained tensor."""
        values = self.theta[tensor.offset : tensor.offset + tensor.size]
        return values.reshape(tensor.shape)

    def keep(self, name: str, values: Array) -> str:
        """Have a weight under that name, or under another one where it is another graph's."""
        while (known := self.weights.get(name)) is not None and known is not values:
            if known.shape == values.shape and np.array_equal(known, values):
                return name
            name += "_"
        self.weights[name] = values
        return name


def merge_graph(model: onnx.ModelProto, constants: Mapping[str, Array], shared: Merging) -> None:
    """Rewrite a graph in place; `constants` are all its initializers but theta.

    Raises Refused(PLAN_UNSUPPORTED) when a trained value goes a way that nothing here knows.
    """
    graph = _Graph(model, dict(constants), shared)
    graph.fold_constants()
    graph.fold_theta()
    graph.fold_residuals()
    graph.merge_adapters()
    graph.finish()


@dataclass(frozen=True)
class _Product:
    """Where a weight (of rank 2) enters a product; `flipped`: as (in, out)."""

    node: onnx.NodeProto
    index: int
    flipped: bool


class _Graph:
    """A graph on its way."""

    def __init__(
        self, model: onnx.ModelProto, constants: dict[str, Array], shared: Merging
    ) -> None:
        self._graph = model.graph
        self._constants = constants
        self._shared = shared
        self._trained: dict[str, Indices] = {}  # values that are parts of theta
        self._nodes = list(model.graph.node)

    def fold_constants(self) -> None:
        """Read constants that are nodes, and make integer weights float once and for all."""
        kept = []
        for node in self._nodes:
            if node.op_type in _CONSTANT and set(node.input) <= set(self._constants):
                feeds = {name: self._constants[name] for name in node.input}
                self._constants[node.output[0]] = _evaluated(node, feeds)[0]
            else:
                kept.append(node)
        self._nodes = kept

    def fold_theta(self) -> None:
        """Follow theta through all that only rearranges it."""
        self._trained["theta"] = np.arange(self._shared.plan.parameter_count)
        kept = []
        for node in self._nodes:
            first, *others = node.input or [""]
            fixed = all(name in self._constants for name in others)
            if first in self._trained and fixed and node.op_type in _REARRANGING:
                feeds = {name: self._constants[name] for name in others}
                feeds[first] = self._trained[first]
                self._trained.update(zip(node.output, _evaluated(node, feeds), strict=True))
            else:
                kept.append(node)
        self._nodes = kept

    def fold_residuals(self) -> None:
        """Add what the server has moved of a frozen weight to it: W + R is a constant."""
        residuals = {t.offset for t in self._shared.plan.layout if t.role is Role.RESIDUAL}
        renamed: dict[str, str] = {}
        kept = []
        for node in self._nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            own = [name for name in node.input if self._starts(name) in residuals]
            weight = [name for name in node.input if name in self._constants]
            if node.op_type == "Add" and len(own) == len(weight) == 1:
                moved = f"{weight[0]}.moved"
                added = self._shared.theta[self._trained[own[0]]]
                self._constants[moved] = self._constants[weight[0]] + added
                renamed[node.output[0]] = moved
            else:
                kept.append(node)
        self._nodes = kept

    def _starts(self, value: str) -> int | None:
        """Return where in theta a part of it begins; None for the whole, and for what is none."""
        indices = self._trained.get(value)
        return None if indices is None or value == "theta" else int(indices.flat[0])

    def merge_adapters(self) -> None:
        """Take every low-rank product out of the graph, into the weight that it stands beside."""
        zeros = self._lora_b()
        producers = {output: node for node in self._nodes for output in node.output}
        renamed: dict[str, str] = {}
        places: dict[tuple[str, str], list[_Product]] = {}
        kept = []
        for node in self._nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            zero = [name for name in node.input if name in zeros]
            if not zero:
                kept.append(node)
                continue
            tensor = zeros[zero[0]]
            if node.op_type == "Add" and len(zero) == 1:
                (other,) = (name for name in node.input if name != zero[0])
                product = self._product(other, producers)
                weight = product.node.input[product.index]
                places.setdefault((weight, tensor.name), []).append(product)
                renamed[node.output[0]] = other
            elif self._stays_zero(node, zeros):
                zeros.update(dict.fromkeys(node.output, tensor))
            else:
                raise _unknown(f"no {node.op_type} behind {tensor.name}")
        self._nodes = kept
        self._rename_outputs(renamed)
        self._add_up(places)

    def _lora_b(self) -> dict[str, TrainableTensor]:
        low_rank = [t for t in self._shared.plan.layout if t.role is Role.LORA_B]
        starts = {tensor.offset: tensor for tensor in low_rank}
        return {
            name: starts[int(indices.flat[0])]
            for name, indices in self._trained.items()
            if name != "theta" and indices.size and int(indices.flat[0]) in starts
        }

    @staticmethod
    def _stays_zero(node: onnx.NodeProto, zeros: Mapping[str, TrainableTensor]) -> bool:
        if node.op_type in _KEEPING_ZERO:
            return node.input[0] in zeros
        if node.op_type == "Gemm":
            return len(node.input) == 2 or not node.input[2]
        return node.op_type in ("MatMul", "Mul") or (
            node.op_type == "Div" and node.input[0] in zeros
        )

    def _product(self, value: str, producers: Mapping[str, onnx.NodeProto]) -> _Product:
        """Find the adapted layer's own product, before its bias and changes of shape."""
        start = value
        while (node := producers.get(value)) is not None:
            if node.op_type in _PRODUCTS:
                for index in (1, 0):
                    name = node.input[index]
                    if name in self._constants and self._constants[name].ndim == 2:
                        flip = _integer(node, "transB" if index else "transA")
                        return _Product(node, index, flipped=bool(flip) != bool(index))
                break
            moving = [n for n in node.input if n not in self._constants and n not in self._trained]
            if node.op_type in _REARRANGING:
                moving = moving[:1]
            if len(moving) != 1 or node.op_type not in ("Add", *_REARRANGING):
                break
            value = moving[0]
        raise _unknown(f"a product with a frozen weight where an adapter is added to {start}")

    def _add_up(self, places: Mapping[tuple[str, str], list[_Product]]) -> None:
        for (weight, lora_b), products in places.items():
            taken = {(id(place.node), place.index) for place in products}
            elsewhere = any(
                name == weight and (id(node), index) not in taken
                for node in self._nodes
                for index, name in enumerate(node.input)
            )
            key = (weight, lora_b)
            if key not in self._shared.merged:
                self._shared.merged[key] = self._sum(weight, lora_b, products[0].flipped)
            name = f"{weight}.merged" if elsewhere else weight
            while elsewhere and name in self._constants:  # adapters that share one weight
                name += "_"
            self._constants[name] = self._shared.merged[key]
            for place in products:
                place.node.input[place.index] = name

    def _sum(self, weight: str, lora_b: str, flipped: bool) -> Array:
        """W + (alpha / rank) B A, with the product in float64: rounded once."""
        tensors = {tensor.name: tensor for tensor in self._shared.plan.layout}
        lora_a = lora_b.replace(".lora_B.", ".lora_A.")
        a = self._shared.slice(tensors[lora_a]) if lora_a in tensors else self._constants[lora_a]
        b = self._shared.slice(tensors[lora_b])  # (out, rank); a is (rank, in)
        origin = self._shared.plan.origin
        change = (origin.lora_alpha / origin.lora_rank) * (b.astype(np.float64) @ a)
        before = self._constants[weight]
        if (change.T if flipped else change).shape != before.shape:
            raise _unknown(f"{weight} with the extents of {lora_b}")
        return (before + (change.T if flipped else change)).astype(np.float32)

    def _rename_outputs(self, renamed: Mapping[str, str]) -> None:
        for output in self._graph.output:
            if output.name in renamed:
                source = renamed[output.name]
                self._nodes.append(onnx.helper.make_node("Identity", [source], [output.name]))

    def finish(self) -> None:
        """Leave what the outputs need, with every trained tensor under its own name."""
        used = self._drop_unused()
        names: dict[str, str] = {}
        for value in used:
            if (indices := self._trained.get(value)) is not None:
                names[value] = self._keep_trained(indices)
            elif value in self._constants:
                names[value] = self._shared.keep(value, self._constants[value])
        for number, node in enumerate(self._nodes):
            node.input[:] = [names.get(name, name) for name in node.input]
            node.name = f"node{number}"  # quantisers tell nodes apart by their names
        graph = self._graph
        inputs = [value for value in graph.input if value.name != "theta"]
        del graph.node[:], graph.initializer[:], graph.input[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.input.extend(inputs)
        weights = self._shared.weights
        for name in dict.fromkeys(names.values()):
            graph.initializer.append(_declared(name, weights[name]))

    def _drop_unused(self) -> list[str]:
        """Return what the nodes that are left read, in order."""
        needed = {output.name for output in self._graph.output}
        kept = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        self._nodes = kept[::-1]
        return list(dict.fromkeys(name for node in self._nodes for name in node.input if name))

    def _keep_trained(self, indices: Indices) -> str:
        """Keep part of theta as a weight: a tensor as it is goes by its name."""
        shared = self._shared
        values = shared.theta[indices]
        whole = [t for t in shared.plan.layout if t.offset == indices.flat[0]]
        if not whole or whole[0].size != indices.size:
            raise _unknown("trained tensors that are used whole")
        return shared.keep(whole[0].name.removeprefix(_PEFT_PREFIX), values)


def _evaluated(node: onnx.NodeProto, feeds: Mapping[str, Array]) -> list[Array]:
    return list(ReferenceEvaluator(node).run(None, dict(feeds)))


def _declared(name: str, values: Array) -> onnx.TensorProto:
    """Name a weight; its bytes come when it is known where they lie."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    return onnx.TensorProto(name=name, data_type=kind, dims=values.shape)


def _integer(node: onnx.NodeProto, name: str) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), 0)


def _unknown(expected: str) -> Refused:
    return Refused(Reason.PLAN_UNSUPPORTED, f"expected a graph that can be merged: {expected}")


def looked_up_rows(model: onnx.ModelProto) -> Iterator[int]:
    """Yield the number of rows of each table that `input_ids` look into, before the merging."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    ids = {"input_ids"}
    for node in model.graph.node:
        if node.op_type in _KEEPING_ZERO and node.input[0] in ids:
            ids.update(node.output)
        elif node.op_type == "Gather" and node.input[1] in ids and node.input[0] in rows:
            yield rows[node.input[0]]
