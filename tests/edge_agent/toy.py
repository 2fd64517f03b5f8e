"""A toy plan made by hand: the mean of frozen word embeddings, then a linear classifier.

It keeps the contract of `fedloom/v1/plan.proto` without torch or transformers, and its gradient is
written down in ONNX operators: nothing in the agent may know more about a model than that.
"""

import csv
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.data import DataSource
from fedloom.adapters import Theta, adapter_header, write_adapter
from fedloom.graph_contracts import EVAL_GRAPH, INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
    PlanMember,
    PlanOrigin,
    TrainableTensor,
)
from fedloom.tasks import TextClassification

LABELS = ("lights", "music", "weather")
WORDS = {
    "lights": ("lamp", "bright", "dim", "switch", "bulb", "dark"),
    "music": ("song", "play", "loud", "artist", "album", "tune"),
    "weather": ("rain", "sunny", "cold", "storm", "cloud", "wind"),
}
FILLERS = ("please", "the", "now", "in", "my", "room", "today", "a", "for", "me")
VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *(w for ws in WORDS.values() for w in ws),
    *FILLERS,
)
DIM = 32
CLASSES = len(LABELS)
LAYOUT = (
    TrainableTensor("classifier.weight", (CLASSES, DIM), 0),
    TrainableTensor("classifier.bias", (CLASSES,), CLASSES * DIM),
)
PARAMETERS = CLASSES * DIM + CLASSES
EMBEDDINGS_AT = 64  # bytes before the embeddings in base.safetensors; the toy's header is blank

HEAD = '<ir_version: 8, opset_import: ["": 18]>'
LOGITS = f"""
  weight_end = Constant<value = int64[1] {{{CLASSES * DIM}}}>()
  zero = Constant<value = int64[1] {{0}}>()
  one = Constant<value = int64[1] {{1}}>()
  last = Constant<value = int64[1] {{{PARAMETERS}}}>()
  weight_shape = Constant<value = int64[2] {{{CLASSES}, {DIM}}}>()
  flat_weight = Slice(theta, zero, weight_end, zero)
  weight = Reshape(flat_weight, weight_shape)
  bias = Slice(theta, weight_end, last, zero)
  words = Gather(embeddings, input_ids)
  present = Cast<to = 1>(attention_mask)
  minus_one = Constant<value = int64[1] {{-1}}>()
  column = Unsqueeze(present, minus_one)
  present_words = Mul(words, column)
  total = ReduceSum<keepdims = 0>(present_words, one)
  count = ReduceSum(present, one)
  mean = Div(total, count)
  logits = Gemm<transB = 1>(mean, weight, bias)
"""
TRAIN_TEXT = f"""{HEAD}
train (float[{PARAMETERS}] theta, int64[B,S] input_ids, int64[B,S] attention_mask,
       int64[B] labels, float[B] sample_weight)
  => (float loss_sum, float weight_sum, float correct, float[{PARAMETERS}] grad_sum) {{
  {LOGITS}
  log_probability = LogSoftmax<axis = -1>(logits)
  classes = Constant<value = int64 {{{CLASSES}}}>()
  off_on = Constant<value = float[2] {{0.0, 1.0}}>()
  target = OneHot(labels, classes, off_on)
  row_weight = Unsqueeze(sample_weight, minus_one)
  target_log = Mul(target, log_probability)
  weighted_log = Mul(target_log, row_weight)
  log_sum = ReduceSum<keepdims = 0>(weighted_log)
  loss_sum = Neg(log_sum)
  weight_sum = ReduceSum<keepdims = 0>(sample_weight)
  best = ArgMax<axis = -1, keepdims = 0>(logits)
  right = Equal(best, labels)
  right_float = Cast<to = 1>(right)
  right_weight = Mul(right_float, sample_weight)
  correct = ReduceSum<keepdims = 0>(right_weight)
  probability = Exp(log_probability)
  error = Sub(probability, target)
  weighted_error = Mul(error, row_weight)
  error_by_class = Transpose<perm = [1, 0]>(weighted_error)
  weight_gradient = MatMul(error_by_class, mean)
  flat_gradient = Reshape(weight_gradient, minus_one)
  bias_gradient = ReduceSum<keepdims = 0>(weighted_error, zero)
  grad_sum = Concat<axis = 0>(flat_gradient, bias_gradient)
}}"""
EVAL_TEXT = f"""{TRAIN_TEXT.partition("log_sum = ")[0].replace("train (", "eval (")}
  log_sum = ReduceSum<keepdims = 0>(weighted_log)
  loss_sum = Neg(log_sum)
  weight_sum = ReduceSum<keepdims = 0>(sample_weight)
  best = ArgMax<axis = -1, keepdims = 0>(logits)
  right = Equal(best, labels)
  right_float = Cast<to = 1>(right)
  right_weight = Mul(right_float, sample_weight)
  correct = ReduceSum<keepdims = 0>(right_weight)
}}""".replace(f"float[{PARAMETERS}] grad_sum", f"float[B,{CLASSES}] logits")
INFER_TEXT = f"""{HEAD}
infer (float[{PARAMETERS}] theta, int64[B,S] input_ids, int64[B,S] attention_mask)
  => (float[B,{CLASSES}] logits) {{ {LOGITS} }}"""


@dataclass(frozen=True)
class Toy:
    """A plan folder, its plan, and the initial theta (P,)."""

    folder: Path
    plan: Plan
    theta: Theta


class Unkept(Checkpoint):
    """Keeps nothing: a training under it is always a whole one."""

    def __init__(self) -> None:
        super().__init__(Path(), bytes(16), 1)

    def load(self, fresh: TrainingState) -> TrainingState:
        """Begin."""
        return fresh

    def save(self, state: TrainingState) -> None:
        """Forget."""


def _save_graph(path: Path, text: str, theta_has_default: bool) -> None:
    model = onnx.parser.parse_model(text)
    external = [("embeddings", (len(VOCABULARY), DIM), BASE_FILE, EMBEDDINGS_AT)]
    if theta_has_default:
        external.append(("theta", (PARAMETERS,), ADAPTER_FILE, len(adapter_header(LAYOUT))))
    for name, shape, location, offset in external:
        tensor = model.graph.initializer.add(
            name=name, data_type=onnx.TensorProto.FLOAT, dims=shape
        )
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", location),
            ("offset", offset),
            ("length", 4 * int(np.prod(shape))),
        ):
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def _save_tokenizer(path: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))


def save_toy(
    folder: Path,
    train_text: str = TRAIN_TEXT,
    infer_text: str = INFER_TEXT,
    max_tokens: int = 16,
    eval_text: str = EVAL_TEXT,
) -> Toy:
    """Write the plan into a new folder."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(7)
    embeddings = generator.standard_normal((len(VOCABULARY), DIM)).astype("<f4")
    theta = (0.01 * generator.standard_normal(PARAMETERS)).astype(np.float32)
    (folder / BASE_FILE).write_bytes(b" " * EMBEDDINGS_AT + embeddings.tobytes())
    (folder / ADAPTER_CONFIG_FILE).write_text("{}")
    write_adapter(folder / ADAPTER_FILE, LAYOUT, theta)
    _save_tokenizer(folder / TOKENIZER_FILE)
    _save_graph(folder / TRAIN_GRAPH, train_text, theta_has_default=False)
    _save_graph(folder / EVAL_GRAPH, eval_text, theta_has_default=False)
    _save_graph(folder / INFER_GRAPH, infer_text, theta_has_default=True)
    members = tuple(
        PlanMember(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(folder.iterdir())
    )
    task = TextClassification(LABELS, max_tokens, pad_token_id=0)
    plan = Plan("toy", members, LAYOUT, task, PlanOrigin("toy"))
    (folder / PLAN_FILE).write_bytes(plan.encode())
    return Toy(folder, plan, theta)


def toy_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Return (text, label) rows: two words of the label's among fillers, of varied length."""
    generator = random.Random(seed)  # noqa: S311 - test data
    rows = []
    for _ in range(count):
        label = generator.choice(LABELS)
        words = generator.choices(WORDS[label], k=2) + generator.choices(
            FILLERS, k=generator.randint(0, 8)
        )
        generator.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_rows(path: Path, rows: list[tuple[str, str]]) -> DataSource:
    """Write rows under a header into a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return DataSource(path)
