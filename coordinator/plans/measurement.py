"""What one training step of a plan takes on this machine: a process of its own runs a random batch.

It runs the graph as devices do, with numpy and ONNX Runtime alone, so that its peak is near theirs.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.graph_contracts import BATCH, Axis, train_contract
from fedloom.plans import ADAPTER_FILE, TOKENIZER_FILE, Plan, load_plan
from fedloom.tasks import ArrayLearning, CausalLanguageModelling, Task

STEP_TOKENS = 256  # padded, as devices cut their micro-batches
STEP_ROWS = 16
_RUNS = 3  # after one to warm up


@dataclass(frozen=True)
class StepFigures:
    """The fastest of a few steps; `peak_bytes` is the whole process's, 0 where it is not known."""

    rows: int
    tokens: int
    seconds: float
    peak_bytes: int


def measure_step(folder: Path) -> StepFigures:
    """Measure in a new process; raises ConfigError where that fails."""
    command = [sys.executable, "-m", "coordinator.plans.measurement", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        last = next(reversed(done.stderr.strip().splitlines()), "no message")
        raise ConfigError(str(folder), f"expected a training step to run, found: {last[:300]}")
    return StepFigures(**json.loads(done.stdout.splitlines()[-1]))


def step_shape(task: Task) -> tuple[int, int]:
    """Return rows and tokens of a full micro-batch; 1 token for arrays."""
    if isinstance(task, ArrayLearning):
        return STEP_ROWS, 1
    return min(STEP_ROWS, max(1, STEP_TOKENS // task.max_tokens)), task.max_tokens


def random_batch(
    folder: Path, plan: Plan, rows: int, tokens: int
) -> dict[str, NDArray[np.generic]]:
    """Make the inputs of `train.onnx` but theta: full rows without padding."""
    random = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {}
    for name, port in train_contract(
        plan.task, plan.parameter_count, plan.trained_count
    ).inputs.items():
        shape = [_extent(axis, rows, tokens) for axis in port.axes]
        match name:
            case "theta":
                continue
            case "attention_mask":
                feeds[name] = np.ones(shape, np.int64)
            case "sample_weight":
                feeds[name] = np.ones(shape, np.float32)
            case _ if port.type == "tensor(int64)":
                feeds[name] = random.integers(0, _values_of(name, plan.task, folder), shape)
            case _:
                feeds[name] = random.standard_normal(shape, np.float32)
    return feeds


def _extent(axis: Axis, rows: int, tokens: int) -> int:
    if isinstance(axis, int):
        return axis
    return rows if axis == BATCH else tokens


def _values_of(name: str, task: Task, folder: Path) -> int:
    """Return how many different values an integer input takes."""
    if isinstance(task, CausalLanguageModelling):
        return task.vocabulary_size
    if name == "labels":
        return len(task.labels)
    tokenizer = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    return len(tokenizer["model"]["vocab"])  # an object or a list, by the kind of tokenizer


def _measured(folder: Path) -> StepFigures:
    import onnxruntime

    plan = load_plan(folder)
    graph = train_contract(plan.task, plan.parameter_count, plan.trained_count)
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        folder / graph.file, options, providers=["CPUExecutionProvider"]
    )
    rows, tokens = step_shape(plan.task)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    feeds = {"theta": theta, **random_batch(folder, plan, rows, tokens)}
    seconds = []
    for _ in range(_RUNS + 1):
        started = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - started)
    return StepFigures(rows, tokens, min(seconds[1:]), _peak_bytes())


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(json.dumps(asdict(_measured(parser.parse_args().folder))))
