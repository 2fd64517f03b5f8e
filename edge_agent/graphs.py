"""A plan's graphs in ONNX Runtime: their contract, sessions that keep it, text as their input."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from tokenizers import Tokenizer

from edge_agent.batches import TokenisedTexts, micro_batches
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import INFER_GRAPH, TOKENIZER_FILE, TRAIN_GRAPH, Plan

_MAX_INFERENCE_ROWS = 64
_MAX_INFERENCE_TOKENS = 512  # padded tokens in one run: bounds the memory of activations
_TOKENISED_AT_ONCE = 1024

# ONNX Runtime's exceptions have no common type of their own.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class Port:
    """An input or output: ONNX's name of the type, and a letter for each axis.

    B rows and S tokens are free; P parameters and C classes are the plan's.
    """

    type: str
    axes: str


@dataclass(frozen=True)
class Graph:
    """A graph that plans have, as `fedloom/v1/plan.proto` states it."""

    file: str
    failure: Reason  # of a refusal because the graph was loaded but could not be run
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


_F32, _I64 = "tensor(float)", "tensor(int64)"
_TEXTS = {
    "theta": Port(_F32, "P"),
    "input_ids": Port(_I64, "BS"),
    "attention_mask": Port(_I64, "BS"),
}
TRAIN = Graph(
    TRAIN_GRAPH,
    Reason.TRAINING_FAILED,
    {**_TEXTS, "labels": Port(_I64, "B"), "sample_weight": Port(_F32, "B")},
    {
        "loss_sum": Port(_F32, ""),
        "weight_sum": Port(_F32, ""),
        "correct": Port(_F32, ""),
        "grad_sum": Port(_F32, "P"),
    },
)
INFER = Graph(INFER_GRAPH, Reason.PLAN_UNSUPPORTED, _TEXTS, {"logits": Port(_F32, "BC")})


class GraphSession:
    """One loaded graph; dropping the object gives its memory back."""

    def __init__(self, folder: Path, graph: Graph, plan: Plan, threads: int) -> None:
        """Load the graph; Refused(PLAN_UNSUPPORTED) when it cannot be or breaks the contract."""
        self._graph = graph
        try:
            self._session = ort.InferenceSession(
                str(folder / graph.file), _options(threads), providers=["CPUExecutionProvider"]
            )
        except _ORT_ERRORS as error:
            problem = str(error).replace(str(folder), "")[:200]
            raise Refused(
                Reason.PLAN_UNSUPPORTED,
                f"expected ONNX Runtime {ort.__version__} to load {graph.file}, found: {problem}",
            ) from error
        _check_contract(self._session, graph, plan)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the named outputs, or refuse with the graph's reason of failure."""
        try:
            found: list[NDArray[Any]] = self._session.run(list(outputs), dict(feeds))
        except _ORT_ERRORS as error:
            raise Refused(
                self._graph.failure,
                f"expected {self._graph.file} to run, found ONNX Runtime's {type(error).__name__}",
            ) from error
        return found


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.enable_mem_pattern = False  # a quarter less memory at the peak, at no cost
    # Packed copies of the weights would not be shared with the mapped file, and gain nothing here.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Threads that wait must not keep a core busy: the device has other work, and agents share it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _check_contract(session: ort.InferenceSession, graph: Graph, plan: Plan) -> None:
    required = {port.name: port for port in session.get_inputs()}
    # An input with a default value, such as theta in infer.onnx, is listed apart.
    inputs = required | {port.name: port for port in session.get_overridable_initializers()}
    outputs = {port.name: port for port in session.get_outputs()}
    for name in required:
        _require(name in graph.inputs, f"{graph.file} without an input {name[:64]!r}", "one")
    extents = {"P": plan.parameter_count, "C": len(plan.task.labels)}
    for kind, expected, found in (
        ("input", graph.inputs, inputs),
        ("output", graph.outputs, outputs),
    ):
        for name, port in expected.items():
            what = f"{graph.file} with {kind} {name}: {port.type} {list(port.axes)}"
            _require(name in found, what, "none")
            fits = _port_fits(port, found[name].type, found[name].shape, extents)
            _require(
                fits,
                f"{what} with P {extents['P']}, C {extents['C']}",
                f"{found[name].type} {found[name].shape}",
            )


def _port_fits(
    port: Port, found_type: str, shape: list[int | str | None], extents: Mapping[str, int]
) -> bool:
    """Compare a declared shape, in which a name or None stands for a free extent."""
    if found_type != port.type or len(shape) != len(port.axes):
        return False
    return all(
        extent == extents[axis] if axis in extents else not isinstance(extent, int)
        for axis, extent in zip(port.axes, shape, strict=True)
    )


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Refused(Reason.PLAN_UNSUPPORTED, f"expected {what}, found {found}")


class TextEncoder:
    """Texts to token ids, cut to the task's `max_tokens`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises nothing more specific
            raise Refused(
                Reason.PLAN_UNSUPPORTED, f"expected {TOKENIZER_FILE} to load: {str(error)[:200]}"
            ) from error
        self._tokenizer.enable_truncation(plan.task.max_tokens)
        self._tokenizer.no_padding()
        self._pad_token_id = plan.task.pad_token_id

    def ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield each text's ids; a text without any becomes one padding token that counts."""
        remaining = iter(texts)
        while block := list(itertools.islice(remaining, _TOKENISED_AT_ONCE)):
            for encoding in self._tokenizer.encode_batch(block):
                yield encoding.ids or [self._pad_token_id]


def batched_logits(
    session: GraphSession, theta: Theta, texts: TokenisedTexts, pad_token_id: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Yield (rows (B,), logits (B, C)) until every text has been through `infer.onnx` once."""
    lengths = texts.lengths
    for rows in micro_batches(
        np.arange(len(lengths)), lengths, _MAX_INFERENCE_ROWS, _MAX_INFERENCE_TOKENS
    ):
        input_ids, attention_mask = texts.padded(rows, pad_token_id)
        (logits,) = session.run(
            ["logits"],
            {"theta": theta, "input_ids": input_ids, "attention_mask": attention_mask},
        )
        yield rows, logits.astype(np.float64)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities (B, C), without overflow for any finite logits."""
    shifted: NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
