"""Toy models of the tasks besides classification and text: a tagger that knows words, a sum."""

import hashlib
from pathlib import Path

import numpy as np
import onnx.parser
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedloom.adapters import write_adapter
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import (
    ADAPTER_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
    PlanMember,
    PlanOrigin,
    TrainableTensor,
)
from fedloom.tasks import ArrayInput, ArrayLearning, Task, TokenClassification

TAGS = ("O", "B-place", "I-place", "B-time")
WORDS = {"New": 1, "York": 2, "Paris": 1, "noon": 3}  # word -> its tag
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
_HEAD = '<ir_version: 8, opset_import: ["": 18]>'


def save_tagger(folder: Path, max_tokens: int = 16) -> Plan:
    """Write a plan whose theta is a table: a tag's logit for each word of the vocabulary."""
    shape = (len(VOCABULARY), len(TAGS))
    theta = np.zeros(shape, np.float32)
    theta[:4, 0] = 4.0
    for number, word in enumerate(VOCABULARY[4:], start=4):
        theta[number, WORDS[word]] = 4.0
    folder.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / TOKENIZER_FILE))
    graph = f"""{_HEAD}
    infer (float[{theta.size}] theta, int64[B,S] input_ids, int64[B,S] attention_mask)
      => (float[B,S,{len(TAGS)}] logits) {{
      shape = Constant<value = int64[2] {{{shape[0]}, {shape[1]}}}>()
      table = Reshape(theta, shape)
      logits = Gather(table, input_ids)
    }}"""
    task = TokenClassification(TAGS, max_tokens, pad_token_id=0)
    return _save(folder, graph, task, TrainableTensor("table", shape, 0), theta)


def save_sums(folder: Path, labels: tuple[str, ...] = ()) -> Plan:
    """Write a plan that sums `left` (2, 3) and scales `right` (), by class or as values."""
    folder.mkdir(parents=True)
    graph = f"""{_HEAD}
    infer (float[1] theta, float[B,2,3] left, float[B] right) => (float[B,2] logits) {{
      axes = Constant<value = int64[2] {{1, 2}}>()
      one = Constant<value = int64[1] {{1}}>()
      total = ReduceSum<keepdims = 0>(left, axes)
      scaled = Mul(right, theta)
      total_column = Unsqueeze(total, one)
      scaled_column = Unsqueeze(scaled, one)
      logits = Concat<axis = 1>(total_column, scaled_column)
    }}"""
    inputs = (ArrayInput("left", (2, 3)), ArrayInput("right", ()))
    task = ArrayLearning(inputs, labels, 0 if labels else 2)
    tensor = TrainableTensor("scale", (1,), 0)
    return _save(folder, graph, task, tensor, np.array([10], np.float32))


def _save(folder: Path, graph: str, task: Task, tensor: TrainableTensor, theta: np.ndarray) -> Plan:
    (folder / INFER_GRAPH).write_bytes(onnx.parser.parse_model(graph).SerializeToString())
    write_adapter(folder / ADAPTER_FILE, (tensor,), theta)
    members = tuple(
        PlanMember(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(folder.iterdir())
    )
    plan = Plan("toy", members, (tensor,), task, PlanOrigin("toy"))
    (folder / PLAN_FILE).write_bytes(plan.encode())
    return plan
