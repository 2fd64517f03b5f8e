"""What each graph of a plan takes and gives, as `plan.proto` states it: builders and devices agree.

An axis is an extent, or the name of one that varies from run to run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.errors import Reason, Refused
from fedloom.tasks import (
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)

TRAIN_GRAPH = "train.onnx"
TRAIN_DP_GRAPH = "train_dp.onnx"
EVAL_GRAPH = "eval.onnx"
INFER_GRAPH = "infer.onnx"
GEN_GRAPH = "gen.onnx"

BATCH = "batch"
SEQUENCE = "sequence"
PAST = "past"  # tokens in the key-value cache
WHOLE = "past + sequence"
_F32, _I64 = "tensor(float)", "tensor(int64)"

Axis = int | str


@dataclass(frozen=True)
class Port:
    """An input or output: ONNX's name of the type, and its axes."""

    type: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class GraphContract:
    """A graph's file and its ports by name, in order."""

    file: str
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


def train_contract(task: Task, parameter_count: int, trained_count: int = 0) -> GraphContract:
    """`train.onnx`: sums over the batch, and the gradient's, (T,); T is P where it is not given."""
    gradient = {"grad_sum": Port(_F32, (trained_count or parameter_count,))}
    return GraphContract(TRAIN_GRAPH, _batch(task, parameter_count), _SUMS | gradient)


def train_dp_contract(task: Task, parameter_count: int, trained_count: int = 0) -> GraphContract:
    """`train_dp.onnx`: each row's gradient clipped to a norm of at most `clip`, then summed."""
    clipped = {
        "clipped_grad_sum": Port(_F32, (trained_count or parameter_count,)),
        "grad_norm": Port(_F32, (BATCH,)),
    }
    inputs = _batch(task, parameter_count) | {"clip": Port(_F32, ())}
    return GraphContract(TRAIN_DP_GRAPH, inputs, _SUMS | clipped)


def eval_contract(task: Task, parameter_count: int) -> GraphContract:
    """`eval.onnx`: the sums of a training step without its gradient, and the logits."""
    return GraphContract(EVAL_GRAPH, _batch(task, parameter_count), _SUMS | _logits(task))


def infer_contract(task: Task, parameter_count: int) -> GraphContract:
    """`infer.onnx`: logits of rows without labels; theta has a default."""
    return GraphContract(INFER_GRAPH, _theta(parameter_count) | _inputs(task), _logits(task))


def gen_contract(task: CausalLanguageModelling, parameter_count: int) -> GraphContract:
    """`gen.onnx`: the next token's logits and the grown cache; theta has a default."""
    tokens = {
        "input_ids": Port(_I64, (BATCH, SEQUENCE)),
        "attention_mask": Port(_I64, (BATCH, WHOLE)),
    }
    logits = {"logits": Port(_F32, (BATCH, task.vocabulary_size))}
    return GraphContract(
        GEN_GRAPH,
        _theta(parameter_count) | tokens | _cache(task, "past", PAST),
        logits | _cache(task, "present", WHOLE),
    )


def plan_contracts(
    task: Task, parameter_count: int, trained_count: int = 0
) -> dict[str, GraphContract]:
    """Return the contract of every graph that a plan for `task` may have, by file."""
    contracts = [
        train_contract(task, parameter_count, trained_count),
        train_dp_contract(task, parameter_count, trained_count),
        eval_contract(task, parameter_count),
        infer_contract(task, parameter_count),
    ]
    if isinstance(task, CausalLanguageModelling):
        contracts.append(gen_contract(task, parameter_count))
    return {contract.file: contract for contract in contracts}


class FoundPort(Protocol):
    """What ONNX Runtime says of a port; a name or None in the shape is a free extent."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class LoadedGraph(Protocol):
    """What of an ONNX Runtime session a contract is about."""

    def get_inputs(self) -> Sequence[FoundPort]:
        """Return the inputs that must be given."""

    def get_overridable_initializers(self) -> Sequence[FoundPort]:
        """Return the inputs that have a default, such as theta of `infer.onnx`."""

    def get_outputs(self) -> Sequence[FoundPort]:
        """Return the outputs."""


def check_session(session: LoadedGraph, graph: GraphContract) -> None:
    """Compare a loaded graph with its contract; raises Refused(PLAN_UNSUPPORTED)."""
    required = {port.name: port for port in session.get_inputs()}
    inputs = required | {port.name: port for port in session.get_overridable_initializers()}
    outputs = {port.name: port for port in session.get_outputs()}
    for name in required:
        _require(name in graph.inputs, f"{graph.file} without an input {name[:64]!r}", "one")
    for kind, expected, found in (
        ("input", graph.inputs, inputs),
        ("output", graph.outputs, outputs),
    ):
        for name, port in expected.items():
            what = f"{graph.file} with {kind} {name}: {port.type} {list(port.axes)}"
            _require(name in found, what, "none")
            fits = _port_fits(port, found[name].type, found[name].shape)
            _require(fits, what, f"{found[name].type} {list(found[name].shape)}")


def _port_fits(port: Port, found_type: str, shape: Sequence[int | str | None]) -> bool:
    if found_type != port.type or len(shape) != len(port.axes):
        return False
    return all(
        extent == axis if isinstance(axis, int) else not isinstance(extent, int)
        for axis, extent in zip(port.axes, shape, strict=True)
    )


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Refused(Reason.PLAN_UNSUPPORTED, f"expected {what}, found {found}")


_SUMS = {name: Port(_F32, ()) for name in ("loss_sum", "weight_sum", "correct")}


def _theta(parameter_count: int) -> dict[str, Port]:
    return {"theta": Port(_F32, (parameter_count,))}


def _batch(task: Task, parameter_count: int) -> dict[str, Port]:
    weight = {"sample_weight": Port(_F32, (BATCH,))}
    return _theta(parameter_count) | _inputs(task) | {"labels": _labels(task)} | weight


def _inputs(task: Task) -> dict[str, Port]:
    if isinstance(task, ArrayLearning):
        return {entry.name: Port(_F32, (BATCH, *entry.shape)) for entry in task.inputs}
    tokens = Port(_I64, (BATCH, SEQUENCE))
    return {"input_ids": tokens, "attention_mask": tokens}


def _labels(task: Task) -> Port:
    match task:
        case TextClassification():
            return Port(_I64, (BATCH,))
        case TokenClassification() | CausalLanguageModelling():
            return Port(_I64, (BATCH, SEQUENCE))
        case ArrayLearning():
            return Port(_F32, (BATCH, task.values)) if task.values else Port(_I64, (BATCH,))


def _logits(task: Task) -> dict[str, Port]:
    match task:
        case TextClassification():
            return {"logits": Port(_F32, (BATCH, len(task.labels)))}
        case TokenClassification():
            return {"logits": Port(_F32, (BATCH, SEQUENCE, len(task.labels)))}
        case CausalLanguageModelling():
            return {"logits": Port(_F32, (BATCH, SEQUENCE, task.vocabulary_size))}
        case ArrayLearning():
            return {"logits": Port(_F32, (BATCH, task.logits))}


def _cache(task: CausalLanguageModelling, name: str, length: str) -> dict[str, Port]:
    port = Port(_F32, (BATCH, task.heads, length, task.head_size))
    return {
        f"{name}.{layer}.{part}": port for layer in range(task.layers) for part in ("key", "value")
    }
