"""Graphs made by hand are merged: weights with two uses, integer weights, and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.merging import write_merged, write_quantised
from fedloom.merging.folders import vocabulary_of
from fedloom.plans import Plan, PlanOrigin, Role, TrainableTensor
from fedloom.tasks import TextClassification

WORDS, DIM, RANK, ALPHA = 64, 32, 2, 3.0  # a word is a label too: the head is the table
PREFIX = "base_model.model.table"
LAYOUT = (
    TrainableTensor(f"{PREFIX}.lora_A.weight", (RANK, DIM), 0, Role.LORA_A),
    TrainableTensor(f"{PREFIX}.lora_B.weight", (WORDS, RANK), RANK * DIM, Role.LORA_B),
    TrainableTensor("base_model.model.bias", (WORDS,), RANK * (DIM + WORDS)),
)
COUNT = RANK * (DIM + WORDS) + WORDS
PLAN = Plan(
    "by hand",
    (),
    LAYOUT,
    TextClassification(tuple(f"word {n}" for n in range(WORDS)), 16, 0),
    PlanOrigin("none", RANK, ALPHA, ("table",)),
)
CUT = f"""
  a_end = Constant<value = int64[1] {{{RANK * DIM}}}>()
  b_end = Constant<value = int64[1] {{{RANK * (DIM + WORDS)}}}>()
  zero = Constant<value = int64[1] {{0}}>()
  end = Constant<value = int64[1] {{{COUNT}}}>()
  a_shape = Constant<value = int64[2] {{{RANK}, {DIM}}}>()
  b_shape = Constant<value = int64[2] {{{WORDS}, {RANK}}}>()
  flat_a = Slice(theta, zero, a_end, zero)
  flat_b = Slice(theta, a_end, b_end, zero)
  bias = Slice(theta, b_end, end, zero)
  a = Reshape(flat_a, a_shape)
  b = Reshape(flat_b, b_shape)
"""
LOOK_UP = "words = Gather(table, input_ids)"
LOOK_UP_INTEGERS = """
  integers = Gather(table_integers, input_ids)
  floats = Cast<to = 1>(integers)
  scales = Gather(table_scale_rows, input_ids)
  words = Mul(floats, scales)
  table = DequantizeLinear<axis = 0>(table_integers, table_scale)
"""
ANSWER = f"""
  present = Cast<to = 1>(attention_mask)
  last = Constant<value = int64[1] {{-1}}>()
  column = Unsqueeze(present, last)
  seen = Mul(words, column)
  one = Constant<value = int64[1] {{1}}>()
  state = ReduceSum<keepdims = 0>(seen, one)
  product = Gemm<transB = 1>(state, table, bias)
  low = Gemm<transB = 1>(state, a)
  high = Gemm<transB = 1>(low, b)
  scale = Constant<value = float {{{ALPHA / RANK}}}>()
  change = Mul(high, scale)
  logits = Add(change, product)
"""


def save(folder: Path, text: str, **initializers: np.ndarray) -> Path:
    """Save an inference graph with its weights in it."""
    ports = f"(float[{COUNT}] theta, int64[B,S] input_ids, int64[B,S] attention_mask)"
    head = f'<ir_version: 8, opset_import: ["": 18]> infer {ports} => (float[B,{WORDS}] logits)'
    model = onnx.parser.parse_model(f"{head} {{ {text} }}")
    for name, values in initializers.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    folder.mkdir()
    onnx.save(model, folder / INFER_GRAPH)
    return folder


@pytest.fixture
def theta() -> np.ndarray:
    return np.random.default_rng(2).standard_normal(COUNT).astype(np.float32)


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((WORDS, DIM)).astype(np.float32)


def expected(table: np.ndarray, theta: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The formula, with the table as it was where words are looked up."""
    a, b = theta[: RANK * DIM].reshape(RANK, DIM), theta[RANK * DIM : -WORDS].reshape(WORDS, RANK)
    weight = table + ALPHA / RANK * b.astype(np.float64) @ a
    return table[ids].sum(1) @ weight.T + theta[-WORDS:]


def answer(folder: Path, ids: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / INFER_GRAPH)
    return session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


@pytest.mark.parametrize("integers", [False, True], ids=["floats", "integers"])
def test_a_weight_that_is_also_looked_up_is_merged_in_one_place_only(
    tmp_path: Path, theta: np.ndarray, table: np.ndarray, integers: bool
) -> None:
    if integers:
        scale = (np.abs(table).max(axis=1) / 127).astype(np.float32)
        rounded = np.rint(table / scale[:, None]).astype(np.int8)
        table = rounded * scale[:, None]
        stored = {"table_integers": rounded, "table_scale": scale}
        stored["table_scale_rows"] = scale[:, None]
        source = save(tmp_path / "plan", CUT + LOOK_UP_INTEGERS + ANSWER, **stored)
    else:
        source = save(tmp_path / "plan", CUT + LOOK_UP + ANSWER, table=table)
    assert vocabulary_of(source) == WORDS
    ids = np.random.default_rng(4).integers(0, WORDS, (7, 5))
    for name in ("merged", "int8"):
        (tmp_path / name).mkdir()
    write_merged(source, PLAN, theta, tmp_path / "merged")
    truth = expected(table, theta, ids)
    np.testing.assert_allclose(answer(tmp_path / "merged", ids), truth, rtol=1e-4, atol=1e-3)
    write_quantised(source, PLAN, theta, tmp_path / "merged", tmp_path / "int8")
    found = answer(tmp_path / "int8", ids)
    assert np.linalg.norm(found - truth) < 0.05 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("change = Mul(high, scale)", "change = Relu(high)", "no Relu behind"),
        ("Add(change, product)", "Add(change, state)", "a product with a frozen weight"),
        ("Add(change, product)", "Sub(product, change)", "no Sub behind"),
    ],
)
def test_a_graph_that_uses_an_adapter_in_another_way_is_refused(
    tmp_path: Path, theta: np.ndarray, table: np.ndarray, old: str, new: str, what: str
) -> None:
    assert old in ANSWER
    source = save(tmp_path / "plan", CUT + LOOK_UP + ANSWER.replace(old, new), table=table)
    with pytest.raises(Refused, match=what) as caught:
        write_merged(source, PLAN, theta, tmp_path)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED
    assert f"expected a graph that can be merged: {what}" in str(caught.value)
