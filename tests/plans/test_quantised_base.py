"""A base of small integers: what is stored, that graphs compute with it, and what stays float."""

import dataclasses

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from coordinator.plans import PlanExportError, PlanRequest, build_plan
from fedloom.errors import ConfigError
from fedloom.graph_contracts import EVAL_GRAPH, INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, BaseStorage, load_plan, verify_members
from fedloom.quantisation import (
    SCALE_SUFFIX,
    dequantise_blocks,
    dequantise_rows,
)

GRAPHS = (TRAIN_GRAPH, EVAL_GRAPH, INFER_GRAPH)
STORAGES = (BaseStorage.INT8, BaseStorage.INT4)


@pytest.fixture(scope="module")
def stored(small, graph_cache, tmp_path_factory):
    """The small plan with its base in integers, by storage; compared with torch by its build."""
    plans = {}
    for storage in STORAGES:
        folder = tmp_path_factory.mktemp("plans") / storage.name
        request = PlanRequest(
            model=str(small.model),
            labels=small.plan.task.labels,
            rank=4,
            max_tokens=32,
            base=storage,
        )
        plan = build_plan(request, folder, lambda line: None, graph_cache)
        plans[storage] = dataclasses.replace(small, folder=folder, plan=plan)
    return plans


def read_base(folder):
    """Read the file back as floats, by its public format alone."""
    tensors = load_file(folder / BASE_FILE)
    read = {}
    for name, values in tensors.items():
        scales = tensors.get(name + SCALE_SUFFIX)
        if values.dtype == np.int8:
            values = dequantise_rows(values, scales)
        elif values.dtype == np.uint8:
            values = dequantise_blocks(values, scales)
        if not name.endswith(SCALE_SUFFIX):
            read[name] = values
    return read


@pytest.mark.parametrize("storage", STORAGES)
def test_the_file_holds_the_same_weights_but_for_rounding(small, stored, storage):
    original = load_file(small.folder / BASE_FILE)
    found = read_base(stored[storage].folder)
    assert set(found) == set(original)
    integers = load_file(stored[storage].folder / BASE_FILE)
    for name, weight in original.items():
        if weight.ndim != 2 or weight.size < 1024:
            np.testing.assert_array_equal(found[name], weight)
            continue
        levels = 127 if integers[name].dtype == np.int8 else 8
        largest = np.abs(weight).max(axis=1, keepdims=True)
        assert (np.abs(found[name] - weight) <= largest / levels).all()
    four_bits = {name for name, values in integers.items() if values.dtype == np.uint8}
    if storage is BaseStorage.INT8:
        assert not four_bits
    else:  # all but what is looked up by row, or has no whole blocks: 48 columns
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in four_bits} >= {"query"}
        assert not [
            name for name in four_bits if "embeddings" in name or original[name].shape[1] == 48
        ]


@pytest.mark.parametrize("storage", STORAGES)
def test_the_download_shrinks(small, stored, storage):
    sizes = [
        sum(values.nbytes for values in load_file(built.folder / BASE_FILE).values())
        for built in (small, stored[storage])
    ]
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("storage", STORAGES)
def test_the_plan_says_how_its_base_is_stored(small, stored, storage):
    built = stored[storage]
    plan = load_plan(built.folder)
    assert plan.base_storage is storage
    assert small.plan.base_storage is BaseStorage.FP32
    verify_members(plan, built.folder)
    assert plan.member(ADAPTER_FILE) == small.plan.member(ADAPTER_FILE)
    opset, version = (21, 10) if storage is BaseStorage.INT4 else (18, 8)
    for name in GRAPHS:
        model = onnx.load(built.folder / name, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        assert model.ir_version == version
        onnx.checker.check_model(built.folder / name)


@pytest.mark.parametrize("storage", STORAGES)
def test_no_float_copy_is_shared_between_uses(stored, storage):
    """What is dequantised is read by one node, and dies with it."""
    graph = onnx.load(stored[storage].folder / TRAIN_GRAPH, load_external_data=False).graph
    dequantised = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantised) > 12  # query, key, value, output and two more of two layers, both ways
    for node in dequantised:
        assert sum(list(n.input).count(node.output[0]) for n in graph.node) == 1
    read = [name for node in dequantised for name in node.input[:1]]
    assert len(set(read)) == len(read)


def test_the_graph_reads_the_file_and_nothing_else(
    small, stored, open_graph, random_batch, tmp_path
):
    """Zeroed scales give a network without weights: every row has the same logits."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(stored[BaseStorage.INT8].folder, folder)
    batch = random_batch(small.plan, 4, 9, seed=1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before = open_graph(folder / INFER_GRAPH).run(None, inputs)[0]
    assert np.ptp(before, axis=0).max() > 1e-2
    data = bytearray((folder / BASE_FILE).read_bytes())
    header = int.from_bytes(data[:8], "little")
    import json

    for name, entry in json.loads(data[8 : 8 + header]).items():
        if name.endswith(SCALE_SUFFIX):
            start, end = (8 + header + offset for offset in entry["data_offsets"])
            data[start:end] = bytes(end - start)
    (folder / BASE_FILE).write_bytes(data)
    after = open_graph(folder / INFER_GRAPH).run(None, inputs)[0]
    assert np.ptp(after, axis=0).max() < 1e-5


def test_int8_is_close_to_float(small, stored, open_graph, random_batch, any_theta):
    theta = any_theta(small.plan, 3)
    batch = random_batch(small.plan, 6, 14, seed=3)
    gradients = [
        open_graph(built.folder / TRAIN_GRAPH).run(["grad_sum"], {"theta": theta, **batch})[0]
        for built in (small, stored[BaseStorage.INT8])
    ]
    cosine = gradients[0] @ gradients[1] / np.prod([np.linalg.norm(g) for g in gradients])
    assert cosine > 0.99


def test_another_rounding_in_the_graph_is_found(stored, small, tmp_path):
    """torch computes with the stored values; a graph that scales otherwise does not pass."""
    import shutil

    from coordinator.plans import parity
    from coordinator.plans.families import load_model

    folder = tmp_path / "copy"
    shutil.copytree(stored[BaseStorage.INT8].folder, folder)
    request = PlanRequest(
        model=str(small.model), labels=small.plan.task.labels, rank=4, max_tokens=32
    )
    adapted = load_model(request)  # its weights are not rounded
    with pytest.raises(PlanExportError, match="gradient"):
        parity.check_train(folder, adapted)


def test_a_model_without_frozen_matrices_is_refused(small):
    from coordinator.plans.families import load_model
    from coordinator.plans.quantised import quantise

    request = PlanRequest(model=str(small.model), labels=small.plan.task.labels, rank=4)
    adapted = load_model(dataclasses.replace(request, max_tokens=32))
    with pytest.raises(ConfigError, match="frozen matrices"):
        quantise(adapted, {}, BaseStorage.INT8, used=set())
