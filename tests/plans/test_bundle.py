"""What lies in a plan's folder, and that equal requests give equal bytes."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from coordinator.plans import PlanExportError, PlanRequest, build_plan
from fedloom.adapters import read_adapter
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    load_plan,
    verify_members,
)

GRAPHS = (TRAIN_GRAPH, INFER_GRAPH)


@pytest.fixture
def request_for(small):
    """The request of the small plan, with changes."""
    original = PlanRequest(
        model=str(small.model), labels=small.plan.task.labels, rank=4, max_tokens=32
    )
    return lambda **changes: dataclasses.replace(original, **changes)


@pytest.fixture
def no_export(monkeypatch):
    """Make an export fail the test: the graphs must come from the cache."""

    def refuse(adapted):
        raise AssertionError("exported again")

    monkeypatch.setattr("coordinator.plans.cache.export_graphs", refuse)


def test_plan_names_every_file(small):
    plan = load_plan(small.folder)
    assert plan == small.plan
    verify_members(plan, small.folder)
    names = {path.name for path in small.folder.iterdir()}
    assert names == {member.name for member in plan.members} | {PLAN_FILE}
    assert plan.task.pad_token_id == 0
    assert plan.task.max_tokens == 32
    assert plan.name == plan.origin.base_model == "tiny-bert"
    # Two layers, query and value, A and B of rank 4 and width 32; a head of 5 labels.
    assert plan.parameter_count == 2 * 2 * 2 * 4 * 32 + 5 * 32 + 5


def test_another_process_exports_the_same_bytes(small, tmp_path):
    """Its hashes are salted differently, so that an order taken from a set would show."""
    code = f"""
from pathlib import Path
from coordinator.plans import PlanRequest, build_plan
labels = {small.plan.task.labels!r}
request = PlanRequest(model={str(small.model)!r}, labels=labels, rank=4, max_tokens=32)
build_plan(request, Path("again"), print)
"""
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert load_plan(tmp_path / "again") == small.plan
    verify_members(small.plan, tmp_path / "again")


def test_the_cache_gives_the_same_bytes(small, request_for, graph_cache, no_export, tmp_path):
    lines = []
    again = build_plan(request_for(), tmp_path / "again", lines.append, graph_cache)
    assert again == small.plan
    assert any("cache" in line for line in lines)


def test_graphs_do_not_depend_on_seed_names_or_length(
    small, request_for, graph_cache, no_export, tmp_path
):
    changes = {"seed": 9, "name": "other", "max_tokens": 16, "labels": tuple("abcde")}
    other = build_plan(request_for(**changes), tmp_path / "other", lambda line: None, graph_cache)
    for name in GRAPHS:
        assert other.member(name) == small.plan.member(name)
    assert other.member(BASE_FILE) == small.plan.member(BASE_FILE)
    assert other.member(ADAPTER_FILE) != small.plan.member(ADAPTER_FILE)


@pytest.mark.parametrize("change", [{"rank": 2}, {"alpha": 4.0}, {"labels": ("a", "b")}])
def test_another_structure_is_not_taken_from_the_cache(
    request_for, graph_cache, no_export, tmp_path, change
):
    with pytest.raises(AssertionError, match="exported again"):
        build_plan(request_for(**change), tmp_path / "x", lambda line: None, graph_cache)
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_not_used(small, request_for, graph_cache, no_export, tmp_path):
    damaged = tmp_path / "cache"
    damaged.mkdir()
    for path in graph_cache.glob("*.onnx"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        (damaged / path.name).write_bytes(data)
    with pytest.raises(AssertionError, match="exported again"):
        build_plan(request_for(), tmp_path / "x", lambda line: None, damaged)


def test_initial_adapter(small):
    theta = read_adapter(small.folder / ADAPTER_FILE, small.plan.layout)
    tensors = load_file(small.folder / ADAPTER_FILE)
    assert set(tensors) == {tensor.name for tensor in small.plan.layout}
    for tensor in small.plan.layout:
        values = theta[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        np.testing.assert_array_equal(tensors[tensor.name], values)
        is_zero = tensor.name.endswith(("lora_B.weight", "bias"))
        assert bool(values.any()) != is_zero


def test_base_holds_each_used_weight_once(small):
    weights = load_file(small.folder / BASE_FILE)
    original = load_file(small.model / "model.safetensors")
    used = set()
    for name in GRAPHS:
        graph = onnx.load(small.folder / name, load_external_data=False).graph
        external = {t.name for t in graph.initializer if t.external_data} - {"theta"}
        inline = [len(t.raw_data) for t in graph.initializer if not t.external_data]
        assert max(inline) <= 256  # extents, never values
        used |= external
    assert set(weights) == used
    for name, values in weights.items():
        np.testing.assert_array_equal(values, original[name.removeprefix("bert.")])


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_plain_small_and_without_copies(small, name):
    path = small.folder / name
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == 8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not model.functions
    assert not model.metadata_props
    weights = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    for node in model.graph.node:
        assert not node.metadata_props
        assert not node.doc_string
        # A transposed weight would be folded into a second copy when the graph is loaded.
        assert node.op_type != "Transpose" or node.input[0] not in weights


def test_nothing_tells_where_it_was_built(small):
    machine = [str(small.folder.parent), str(small.model.parent), "site-packages", "/home", "/root"]
    for path in small.folder.iterdir():
        data = path.read_bytes()
        assert not [place for place in machine if place.encode() in data], path.name


def test_adapter_config_is_pefts(small):
    config = json.loads((small.folder / ADAPTER_CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "tiny-bert"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16.0, 0.0)
    assert config["target_modules"] == ["query", "value"]
    assert "classifier" in config["modules_to_save"]


def test_tokenizer_is_neutral(small):
    tokenizer = Tokenizer.from_file(str(small.folder / TOKENIZER_FILE))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    text = "please turn the light on " * 4
    assert len(tokenizer.encode(text).ids) == 22


def test_tokenizer_is_the_published_one(minilm):
    published = Tokenizer.from_file(str(minilm.model / TOKENIZER_FILE))
    published.no_truncation()
    published.no_padding()
    ours = Tokenizer.from_file(str(minilm.folder / TOKENIZER_FILE))
    for text in ("Turn the kitchen lights off, please!", "Überweisung nach Malmö: 12,50 €", ""):
        assert ours.encode(text).ids == published.encode(text).ids


def test_a_plan_whose_graph_is_wrong_never_appears(request_for, graph_cache, monkeypatch, tmp_path):
    from coordinator.plans import cache

    def negated(adapted, folder, report):
        graphs = cache.cached_graphs(adapted, graph_cache, report)
        (negation,) = [n for n in graphs[TRAIN_GRAPH].graph.node if n.op_type == "Neg"]
        negation.op_type = "Identity"
        return graphs

    monkeypatch.setattr("coordinator.plans.build.cached_graphs", negated)
    with pytest.raises(PlanExportError, match="loss 2"):
        build_plan(request_for(), tmp_path / "plan", lambda line: None, None)
    assert not list(tmp_path.iterdir())
