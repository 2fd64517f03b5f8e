"""A plan's graphs in ONNX Runtime: sessions that keep the contract of `fedloom.graph_contracts`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edge_agent.batches import Examples, Indices, micro_batches
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import GraphContract, check_session
from fedloom.plans import BaseStorage

_MAX_INFERENCE_ROWS = 64
_MAX_INFERENCE_TOKENS = 512  # padded tokens in one run: bounds the memory of activations

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


# 4-bit types came with opset 21 (ONNX Runtime 1.18), their kernels in blocks with 1.20.
_OLDEST_RUNTIME = {BaseStorage.INT4: (1, 20)}


def require_runtime(storage: BaseStorage) -> None:
    """Refuse a plan whose weights this device's ONNX Runtime is too old for: PLAN_UNSUPPORTED."""
    oldest = _OLDEST_RUNTIME.get(storage, (0, 0))
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < oldest:
        needed = ".".join(str(part) for part in oldest)
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            f"expected ONNX Runtime {needed} or newer for {storage.name} weights, "
            f"found {ort.__version__}: upgrade it, or use a plan built with --base int8",
        )


class GraphSession:
    """One loaded graph; dropping the object gives its memory back."""

    def __init__(self, folder: Path, graph: GraphContract, threads: int, failure: Reason) -> None:
        """Load the graph; Refused(PLAN_UNSUPPORTED) when it cannot be or breaks the contract.

        `failure` is the reason of a refusal because the graph could be loaded but not run.
        """
        self._graph = graph
        self._failure = failure
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
        check_session(self._session, graph)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the named outputs, or refuse with the graph's reason of failure."""
        try:
            found: list[NDArray[Any]] = self._session.run(list(outputs), dict(feeds))
        except _ORT_ERRORS as error:
            raise Refused(
                self._failure,
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


def batched_logits(
    session: GraphSession, theta: Theta, examples: Examples
) -> Iterator[tuple[Indices, NDArray[np.float64]]]:
    """Yield (rows (B,), logits (B, ...)) until every row has been through `infer.onnx` once."""
    for rows in inference_batches(examples):
        (logits,) = session.run(["logits"], {"theta": theta, **examples.inputs(rows)})
        yield rows, logits.astype(np.float64)


def inference_batches(examples: Examples) -> Iterator[Indices]:
    """Cut all rows into runs that a device has memory for when it keeps no activations."""
    return micro_batches(
        np.arange(len(examples)), examples.lengths, _MAX_INFERENCE_ROWS, _MAX_INFERENCE_TOKENS
    )


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities (B, C), without overflow for any finite logits."""
    shifted: NDArray[np.float64] = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
