"""How much memory a training step needs, from the graph: a device must know before it begins.

Every value's extents are products of the batch B and the sequence S. A run at three tiny shapes
tells which, so the sizes at any shape follow, and with them what is alive at the worst moment. The
runtime may do better (it overwrites, it fuses), and keeps some more (its arena rounds up).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from fedloom.graph_contracts import TRAIN_GRAPH
from fedloom.plans import TrainingMemory

Feeds = Mapping[str, NDArray[np.generic]]
Example = Callable[[int, int], Feeds]  # (B, S) → the inputs of `train.onnx`

_BATCHES, _SEQUENCES = (2, 3), (5, 7)
REFERENCE_TOKENS = 256  # in a step: where the worst moment is looked for
# The arena keeps about so many blocks of the largest weight that is made float for a moment: with
# MiniLM in 8 bits, 9.6 MB more than the step's values were measured, and 2.4 MB is the largest.
_BLOCKS_KEPT = 4
# Nodes that give their input's bytes another shape.
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class _Size:
    """Bytes of a value: unit · B^rows · S^tokens."""

    unit: float
    rows: int  # 0 or 1
    tokens: int  # 0, 1 or 2

    def at(self, batch: int, sequence: int) -> float:
        size: float = self.unit * batch**self.rows * sequence**self.tokens
        return size


def training_memory(folder: Path, example: Example, longest: int) -> TrainingMemory:
    """Estimate the memory of `train.onnx` for rows of up to `longest` tokens."""
    model = onnx.load(folder / TRAIN_GRAPH, load_external_data=False)
    names = [name for node in model.graph.node for name in node.output if name]
    session = _all_values(folder, model, names)
    few, more = _BATCHES
    short, long = _SEQUENCES
    found = [
        {name: value.nbytes for name, value in zip(names, session.run(names, feed), strict=True)}
        for feed in (example(few, short), example(more, short), example(more, long))
    ]
    sizes = {name: _size(*(shape[name] for shape in found)) for name in names}
    batch = max(1, REFERENCE_TOKENS // longest)
    made = [n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"]
    largest = max((sizes[name].unit for name in made), default=0.0)
    at_worst = [sizes[name] for name in _alive_at_worst(model.graph, sizes, batch, longest)]
    return _summed([*at_worst, _Size(_BLOCKS_KEPT * largest, 0, 0)])


def _all_values(
    folder: Path, model: onnx.ModelProto, names: list[str]
) -> onnxruntime.InferenceSession:
    """Load the graph with every value as an output, as it is written."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    given = {output.name for output in model.graph.output}
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return onnxruntime.InferenceSession(
        whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _size(few_short: int, more_short: int, more_long: int) -> _Size:
    """Tell how a value grows from its bytes at (2, 5), (3, 5) and (3, 7)."""
    rows = int(more_short > few_short)
    ratio = _SEQUENCES[1] / _SEQUENCES[0]
    tokens = 0
    if more_long > more_short > 0:
        tokens = min(2, max(1, round(math.log(more_long / more_short) / math.log(ratio))))
    return _Size(more_long / (_BATCHES[1] ** rows * _SEQUENCES[1] ** tokens), rows, tokens)


def _alive_at_worst(
    graph: onnx.GraphProto, sizes: Mapping[str, _Size], batch: int, sequence: int
) -> set[str]:
    """Return the values that exist when they are the most; nodes run in the graph's order."""
    owner: dict[str, str] = {}  # of a view: the value whose bytes it shows
    last: dict[str, int] = {}
    for position, node in enumerate(graph.node):
        if node.op_type in _VIEWS and node.input[0] in sizes:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
        for name in (*node.input, *node.output):
            last[owner.get(name, name)] = position
    for output in graph.output:
        last[owner.get(output.name, output.name)] = len(graph.node)
    alive: set[str] = set()
    total = worst = 0.0
    at_worst: set[str] = set()
    for position, node in enumerate(graph.node):
        new = {name for name in node.output if name and name not in owner}
        alive |= new
        total += sum(sizes[name].at(batch, sequence) for name in new)
        if total > worst:
            worst, at_worst = total, set(alive)
        dead = {name for name in alive if last[name] <= position}
        alive -= dead
        total -= sum(sizes[name].at(batch, sequence) for name in dead)
    return at_worst


def _summed(sizes: list[_Size]) -> TrainingMemory:
    """Add up; what grows with S alone counts for each row, which is never too little."""
    by_tokens = [sum(s.unit for s in sizes if s.tokens == n and (s.rows or n)) for n in range(3)]
    fixed = sum(s.unit for s in sizes if not s.rows and not s.tokens)
    return TrainingMemory(*(math.ceil(value) for value in (fixed, *by_tokens)))
