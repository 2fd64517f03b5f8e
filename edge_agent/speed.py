"""How fast this device trains and answers with a plan, on made-up rows, and in how much memory."""

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.encoders import load_tokenizer
from edge_agent.generation import LanguageModel
from edge_agent.graphs import GraphSession
from edge_agent.inference import Adapter, ArrayModel
from edge_agent.sampling import Sampling
from fedloom.adapters import Theta
from fedloom.errors import Reason
from fedloom.graph_contracts import BATCH, SEQUENCE, Port, train_contract
from fedloom.plans import Plan, Role
from fedloom.tasks import ArrayLearning, CausalLanguageModelling

PROMPT_TOKENS = 64
DECODED_TOKENS = 64
TEXT_WORDS = 24
BATCH_ROWS = 8
BATCH_TOKENS = 64
_LEAST_SAMPLES = 5


@dataclass(frozen=True)
class Timings:
    """How long something took, each time in seconds."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """Return the time that this share of them did not exceed, in seconds."""
        return float(np.quantile(self.seconds, share))

    def rate(self, count: float) -> float:
        """Return how many of `count` things at a time the median makes in a second."""
        return count / self.quantile(0.5)


def without_adapter(plan: Plan, theta: Theta) -> Theta:
    """Return theta with LoRA's B at zero: the base model, as the device had it before."""
    base = theta.copy()
    for tensor in plan.layout:
        if tensor.role is Role.LORA_B:
            base[tensor.offset : tensor.offset + tensor.size] = 0
    return base


def timed(work: Callable[[], object], seconds: float) -> Timings:
    """Do the work over and over, after once for nothing."""
    work()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < _LEAST_SAMPLES or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return Timings(tuple(found))


def time_answers(adapter: Adapter, folder: Path, theta: Theta, seconds: float) -> dict[str, float]:
    """Time what the adapter's task asks for."""
    if isinstance(adapter.model, LanguageModel):
        return _time_generation(adapter.model, theta, seconds)
    model, row = adapter.model, _row(adapter, folder)
    found = timed(lambda: model.answer(theta, [row]), seconds)
    return {
        "latency_p50_ms": 1e3 * found.quantile(0.5),
        "latency_p95_ms": 1e3 * found.quantile(0.95),
    }


def _time_generation(model: LanguageModel, theta: Theta, seconds: float) -> dict[str, float]:
    size = min(PROMPT_TOKENS, model.task.max_tokens // 2)
    ids = _some_ids(model.task.vocabulary_size, size)
    most = min(DECODED_TOKENS, model.task.max_tokens - size)
    prefill = timed(lambda: model.prefill(theta, ids), seconds)
    times = Timings(tuple(_decoding(model, theta, ids, most, seconds)))
    return {
        "prefill_tokens_per_s": prefill.rate(size),
        "decode_tokens_per_s": times.rate(1),
        "token_p50_ms": 1e3 * times.quantile(0.5),
        "token_p95_ms": 1e3 * times.quantile(0.95),
    }


def _decoding(
    model: LanguageModel, theta: Theta, ids: list[int], most: int, seconds: float
) -> Iterator[float]:
    """Yield the time of each token but a text's first, which is the prompt's."""
    end = time.perf_counter() + seconds
    while True:
        tokens = model.tokens(theta, ids, Sampling(), most)
        next(tokens)
        started = time.perf_counter()
        for _ in tokens:
            now = time.perf_counter()
            yield now - started
            started = now
        if started >= end:
            return


def time_training(folder: Path, plan: Plan, theta: Theta, threads: int, seconds: float) -> Any:
    """Time one run of `train.onnx` over a batch of made-up rows."""
    graph = train_contract(plan.task, plan.parameter_count, plan.trained_count)
    session = GraphSession(folder, graph, threads, Reason.TRAINING_FAILED)
    feeds = {
        name: made_up(plan, folder, name, port)
        for name, port in graph.inputs.items()
        if name != "theta"
    }
    found = timed(lambda: session.run(["grad_sum"], {"theta": theta, **feeds}), seconds)
    figures = {
        "train_p50_ms": 1e3 * found.quantile(0.5),
        "train_rows_per_s": found.rate(BATCH_ROWS),
    }
    if "input_ids" in feeds:
        figures["train_tokens_per_s"] = found.rate(feeds["input_ids"].size)
    return figures


def made_up(plan: Plan, folder: Path, name: str, port: Port) -> NDArray[Any]:
    """Return rows for one input of `train.onnx`, the same every time."""
    tokens = min(BATCH_TOKENS, getattr(plan.task, "max_tokens", BATCH_TOKENS))
    extents = {BATCH: BATCH_ROWS, SEQUENCE: tokens}
    shape = tuple(extents[axis] if isinstance(axis, str) else axis for axis in port.axes)
    generator = np.random.default_rng(0)
    if port.type == "tensor(float)":
        if name == "sample_weight":
            return np.ones(shape, np.float32)
        return generator.standard_normal(shape, np.float32)
    if name == "attention_mask":
        return np.ones(shape, np.int64)
    if name == "labels" and not isinstance(plan.task, CausalLanguageModelling):
        return generator.integers(0, len(plan.task.labels), shape)
    return generator.integers(0, _vocabulary(folder, plan), shape)


def _vocabulary(folder: Path, plan: Plan) -> int:
    if isinstance(plan.task, CausalLanguageModelling):
        return plan.task.vocabulary_size
    size: int = load_tokenizer(folder).get_vocab_size(with_added_tokens=False)
    return size


def _row(adapter: Adapter, folder: Path) -> object:
    """Return one made-up input of the adapter's task."""
    if isinstance(adapter.plan.task, ArrayLearning) and isinstance(adapter.model, ArrayModel):
        return {entry.name: np.zeros(entry.shape) for entry in adapter.plan.task.inputs}
    tokenizer = load_tokenizer(folder)
    ids = _some_ids(tokenizer.get_vocab_size(with_added_tokens=False), TEXT_WORDS)
    return " ".join(tokenizer.decode([token]).strip() for token in ids)


def _some_ids(vocabulary: int, count: int) -> list[int]:
    chance = random.Random(0)  # noqa: S311 - repeats itself
    return [chance.randrange(min(4, vocabulary - 1), vocabulary) for _ in range(count)]


def resident_bytes(peak: bool = False) -> int:
    """Return the memory that this process holds, or held at its peak."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
