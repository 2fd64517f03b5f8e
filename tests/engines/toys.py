"""Toy plans of the tasks that `tests/edge_agent/toy.py` is not, and data for them.

Every graph's gradient is written down in ONNX operators, so that it is an oracle for engines that
make their own.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from edge_agent.batches import Feeds, Indices
from fedloom.adapters import write_adapter
from fedloom.graph_contracts import EVAL_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Plan, PlanMember, PlanOrigin, TrainableTensor
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayInput,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TokenClassification,
)
from tests.edge_agent.toy import HEAD, Toy

VOCABULARY, WIDTH, FEATURES, VALUES = 11, 8, 5, 2
TAGS = ("O", "B", "I")
CONSTANTS = """
  zero = Constant<value = int64[1] {0}>()
  one = Constant<value = int64[1] {1}>()
  minus_one = Constant<value = int64[1] {-1}>()
"""
SUM_WEIGHTS = "weight_sum = ReduceSum<keepdims = 0>(each_weight)"

# values = features W' + b; the loss is the squared error, summed over the values.
VALUES_TEXT = f"""
  parts = Constant<value = int64[2] {{{VALUES * FEATURES}, {VALUES}}}>()
  flat_weight, bias = Split<axis = 0>(theta, parts)
  weight_shape = Constant<value = int64[2] {{{VALUES}, {FEATURES}}}>()
  weight = Reshape(flat_weight, weight_shape)
  logits = Gemm<transB = 1>(features, weight, bias)
  error = Sub(logits, labels)
  squares = Mul(error, error)
  square = ReduceSum<keepdims = 0>(squares, one)
  each_weight = Identity(sample_weight)
  weighted = Mul(square, each_weight)
  loss_sum = ReduceSum<keepdims = 0>(weighted)
  {SUM_WEIGHTS}
  correct = Sub(weight_sum, weight_sum)
"""
VALUES_GRADIENT = """
  row_weight = Unsqueeze(sample_weight, minus_one)
  half = Mul(error, row_weight)
  error_gradient = Add(half, half)
  turned = Transpose<perm = [1, 0]>(error_gradient)
  weight_gradient = MatMul(turned, features)
  flat_gradient = Reshape(weight_gradient, minus_one)
  bias_gradient = ReduceSum<keepdims = 0>(error_gradient, zero)
  grad_sum = Concat<axis = 0>(flat_gradient, bias_gradient)
"""


def token_text(classes: int, states: str, taught: str) -> str:
    """Return logits for every token, and the loss of those whose label is not -100."""
    return f"""
  weight_shape = Constant<value = int64[2] {{{classes}, {WIDTH}}}>()
  weight = Reshape(theta, weight_shape)
  turned = Transpose<perm = [1, 0]>(weight)
  words = Gather(embeddings, input_ids)
  logits = MatMul(words, turned)
  two = Constant<value = int64[1] {{2}}>()
  end = Constant<value = int64[1] {{9223372036854775807}}>()
  {states}
  {taught}
  own_logits = MatMul(states, turned)
  nothing = Constant<value = int64 {{0}}>()
  learned = GreaterOrEqual(taught, nothing)
  learned_float = Cast<to = 1>(learned)
  row_weight = Unsqueeze(sample_weight, minus_one)
  each_weight = Mul(learned_float, row_weight)
  log_probability = LogSoftmax<axis = -1>(own_logits)
  classes = Constant<value = int64 {{{classes}}}>()
  off_on = Constant<value = float[2] {{0.0, 1.0}}>()
  target = OneHot(taught, classes, off_on)
  target_log = Mul(target, log_probability)
  own_log = ReduceSum<keepdims = 0>(target_log, minus_one)
  weighted_log = Mul(own_log, each_weight)
  log_sum = ReduceSum<keepdims = 0>(weighted_log)
  loss_sum = Neg(log_sum)
  {SUM_WEIGHTS}
  best = ArgMax<axis = -1, keepdims = 0>(own_logits)
  right = Equal(best, taught)
  right_float = Cast<to = 1>(right)
  right_weight = Mul(right_float, each_weight)
  correct = ReduceSum<keepdims = 0>(right_weight)
"""


SEQUENCE_GRADIENT = """
  probability = Exp(log_probability)
  error = Sub(probability, target)
  token_weight = Unsqueeze(each_weight, minus_one)
  weighted_error = Mul(error, token_weight)
  grad_matrix = Einsum<equation = "bsc,bsd->cd">(weighted_error, states)
  grad_sum = Reshape(grad_matrix, minus_one)
"""
EVERY_TOKEN = "states = Identity(words)", "taught = Identity(labels)"
NEXT_TOKEN = (
    "states = Slice(words, zero, minus_one, one)",
    "taught = Slice(labels, one, end, one)",
)


@dataclass(frozen=True)
class GivenExamples:
    """Examples as they are: `rows` are inputs of a graph by name, each (N, ...)."""

    rows: Feeds
    taught: np.ndarray
    lengths: np.ndarray
    sha256: bytes = bytes(32)

    def __len__(self) -> int:
        return len(self.taught)

    def inputs(self, rows: Indices) -> Feeds:
        """See Examples."""
        return {name: values[rows] for name, values in self.rows.items()}

    def labels(self, rows: Indices) -> Any:
        """See Examples."""
        return self.taught[rows]


@dataclass(frozen=True)
class TaskToy:
    """A toy plan and examples of its task."""

    toy: Toy
    examples: GivenExamples


def save_values_toy(folder: Path) -> TaskToy:
    """Write a plan that learns two numbers from five."""
    task = ArrayLearning((ArrayInput("features", (FEATURES,)),), values=VALUES)
    layout = (
        TrainableTensor("head.weight", (VALUES, FEATURES), 0),
        TrainableTensor("head.bias", (VALUES,), VALUES * FEATURES),
    )
    inputs = f"float[B,{FEATURES}] features, float[B,{VALUES}] labels"
    logits = f"float[B,{VALUES}]"
    toy = _save(folder, task, layout, inputs, logits, VALUES_TEXT, VALUES_GRADIENT)
    random = np.random.default_rng(3)
    features = random.standard_normal((60, FEATURES)).astype(np.float32)
    truth = random.standard_normal((FEATURES, VALUES)).astype(np.float32)
    lengths = np.ones(60, np.int64)
    return TaskToy(toy, GivenExamples({"features": features}, features @ truth + 1, lengths))


def save_token_toy(folder: Path) -> TaskToy:
    """Write a plan that gives every token a tag; a part of the tokens has none to learn."""
    task = TokenClassification(TAGS, 16, 0)
    layout = (TrainableTensor("head.weight", (len(TAGS), WIDTH), 0),)
    text = token_text(len(TAGS), *EVERY_TOKEN)
    toy = _save(folder, task, layout, _TOKENS, f"float[B,S,{len(TAGS)}]", text, SEQUENCE_GRADIENT)
    ids, mask = _tokens()
    labels = np.where((mask == 1) & (ids % 4 != 0), ids % 3, IGNORED_LABEL)
    return TaskToy(toy, _token_examples(ids, mask, labels))


def save_language_toy(folder: Path) -> TaskToy:
    """Write a plan that predicts each next token from the one before it."""
    task = CausalLanguageModelling(16, 0, VOCABULARY, layers=1, heads=1, head_size=1)
    layout = (TrainableTensor("head.weight", (VOCABULARY, WIDTH), 0),)
    text = token_text(VOCABULARY, *NEXT_TOKEN)
    toy = _save(folder, task, layout, _TOKENS, f"float[B,S,{VOCABULARY}]", text, SEQUENCE_GRADIENT)
    ids, mask = _tokens()
    return TaskToy(toy, _token_examples(ids, mask, np.where(mask == 1, ids, IGNORED_LABEL)))


TASK_TOYS = {
    "values": save_values_toy,
    "tags": save_token_toy,
    "language": save_language_toy,
}
_TOKENS = "int64[B,S] input_ids, int64[B,S] attention_mask, int64[B,S] labels"


def _tokens() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    mask = (np.arange(9) < random.integers(3, 10, 60)[:, None]).astype(np.int64)
    ids = np.cumsum(random.integers(1, 3, (60, 9)), 1) % (VOCABULARY - 1) + 1
    return ids * mask, mask


def _token_examples(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> GivenExamples:
    rows = {"input_ids": ids, "attention_mask": mask}
    return GivenExamples(rows, labels, np.full(len(ids), ids.shape[1]))


def _save(
    folder: Path,
    task: Task,
    layout: tuple[TrainableTensor, ...],
    inputs: str,
    logits: str,
    text: str,
    gradient: str,
) -> Toy:
    folder.mkdir(parents=True)
    count = layout[-1].offset + layout[-1].size
    random = np.random.default_rng(2)
    embeddings = random.standard_normal((VOCABULARY, WIDTH)).astype("<f4")
    (folder / BASE_FILE).write_bytes(embeddings.tobytes())
    theta = (0.1 * random.standard_normal(count)).astype(np.float32)
    write_adapter(folder / ADAPTER_FILE, layout, theta)
    takes = f"(float[{count}] theta, {inputs}, float[B] sample_weight)"
    sums = "float loss_sum, float weight_sum, float correct"
    for name, last, body in (
        (TRAIN_GRAPH, f"float[{count}] grad_sum", text + gradient),
        (EVAL_GRAPH, f"{logits} logits", text),
    ):
        graph = f"{HEAD} graph {takes} => ({sums}, {last}) {{ {CONSTANTS} {body} }}"
        model = onnx.parser.parse_model(graph)
        _attach(model, embeddings.nbytes)
        (folder / name).write_bytes(model.SerializeToString())
    members = tuple(
        PlanMember(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(folder.iterdir())
    )
    return Toy(folder, Plan("toy", members, layout, task, PlanOrigin("toy")), theta)


def _attach(model: onnx.ModelProto, length: int) -> None:
    if not any("embeddings" in node.input for node in model.graph.node):
        return
    tensor = model.graph.initializer.add(
        name="embeddings", data_type=onnx.TensorProto.FLOAT, dims=(VOCABULARY, WIDTH)
    )
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", BASE_FILE), ("offset", 0), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
