"""The estimate of a training step's memory is what a careful count of the graph's values gives."""

import dataclasses
import json

import numpy as np
import onnx
import onnx.parser
import pytest

from coordinator.plans.measurement import measure_step, step_shape
from coordinator.plans.measurement import random_batch as random_batch_of
from coordinator.plans.memory import training_memory
from fedloom.errors import ConfigError
from fedloom.graph_contracts import TRAIN_GRAPH

# x (B, S) f32 is 4 BS bytes; the outer product is 4 BSS; the copy shares its bytes.
BY_HAND = """<ir_version: 8, opset_import: ["": 18]>
train (float[B,S] x) => (float total) {
  column = Constant<value = int64[1] {2}>()
  row = Constant<value = int64[1] {1}>()
  standing = Unsqueeze(x, column)
  lying = Unsqueeze(x, row)
  outer = Mul(standing, lying)
  twice = Add(outer, outer)
  sums = ReduceSum<keepdims = 0>(twice, column)
  total = ReduceSum<keepdims = 0>(sums)
}"""


def test_a_graph_counted_by_hand(tmp_path):
    """At worst `outer` and `twice` are alive: 8 bytes for each pair of a row's tokens."""
    model = onnx.parser.parse_model(BY_HAND)
    (tmp_path / TRAIN_GRAPH).write_bytes(model.SerializeToString())
    found = training_memory(
        tmp_path, lambda rows, tokens: {"x": np.ones((rows, tokens), np.float32)}, longest=16
    )
    assert found.token_pair_bytes == 8
    assert found.token_bytes == 0
    assert found.row_bytes == 0
    assert found.fixed_bytes <= 16  # the axes


def counted(folder, feed):
    """The oracle: run with every value as an output, free each after its last reader."""
    import onnxruntime

    model = onnx.load(folder / TRAIN_GRAPH, load_external_data=False)
    nodes = list(model.graph.node)
    outputs = [output.name for output in model.graph.output]
    names = [name for node in nodes for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in outputs)
    whole = folder / "whole.onnx"
    whole.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = onnxruntime.InferenceSession(whole, options).run(names, feed)
    sizes = {name: value.nbytes for name, value in zip(names, values, strict=True)}
    peak = 0
    for now in range(len(nodes)):
        made = {name for node in nodes[: now + 1] for name in node.output if name}
        read = {name for node in nodes[now:] for name in node.input}
        alive = (made & (read | set(outputs))) | {name for name in nodes[now].output if name}
        peak = max(peak, sum(sizes[name] for name in alive))
    return peak


@pytest.mark.parametrize(("rows", "tokens"), [(4, 32), (8, 30), (2, 32)])
def test_the_estimate_is_the_count(small, random_batch, rows, tokens, tmp_path):
    """Views are counted twice by the oracle, and its worst moment may be another one."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(small.folder, folder)
    feed = random_batch(small.plan, rows, tokens, seed=1)
    feed["theta"] = np.zeros(small.plan.parameter_count, np.float32)
    memory = small.plan.training_memory
    assert memory is not None
    expected = counted(folder, feed)
    assert 0.6 * expected <= memory.needed(rows, tokens) <= 1.2 * expected


def test_a_step_is_measured_in_a_process_of_its_own(small):
    figures = measure_step(small.folder)
    assert (figures.rows, figures.tokens) == step_shape(small.plan.task) == (8, 32)
    assert figures.seconds > 0
    assert figures.peak_bytes > 10**7
    json.dumps(dataclasses.asdict(figures))


def test_a_plan_that_does_not_run_says_why(small, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(small.folder, folder)
    (folder / TRAIN_GRAPH).write_bytes(b"no graph")
    with pytest.raises(ConfigError, match="expected a training step to run"):
        measure_step(folder)


def test_random_batches_keep_the_contract(small, open_graph):
    feeds = random_batch_of(small.folder, small.plan, 3, 9)
    theta = np.zeros(small.plan.parameter_count, np.float32)
    loss, weight, *_ = open_graph(small.folder / TRAIN_GRAPH).run(None, {"theta": theta, **feeds})
    assert np.isfinite(loss)
    assert weight == 3
