"""With LoRA's A frozen (FFA-LoRA), theta has only the rest, and nothing else differs."""

import json
import shutil

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from fedloom.adapters import read_adapter
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Role
from tests.plans.conftest import Built


@pytest.fixture(scope="module")
def frozen(small, graph_cache, tmp_path_factory):
    """The small plan once more, with A frozen: the same seed gives the same A."""
    folder = tmp_path_factory.mktemp("plans") / "frozen"
    request = PlanRequest(
        model=str(small.model),
        labels=small.plan.task.labels,
        rank=4,
        max_tokens=32,
        freeze_a=True,
    )
    return Built(folder, build_plan(request, folder, lambda line: None, graph_cache), small.model)


def part(theta: np.ndarray, whole, wanted) -> np.ndarray:
    """Cut the tensors that `wanted` has out of a theta of `whole`."""
    names = {tensor.name for tensor in wanted.layout}
    pieces = [theta[t.offset : t.offset + t.size] for t in whole.layout if t.name in names]
    return np.concatenate(pieces)


def test_theta_has_no_a(small, frozen):
    names = [tensor.name for tensor in small.plan.layout if tensor.role is not Role.LORA_A]
    assert [tensor.name for tensor in frozen.plan.layout] == names
    assert frozen.plan.origin.lora_a_frozen
    assert not small.plan.origin.lora_a_frozen
    theta = read_adapter(frozen.folder / ADAPTER_FILE, frozen.plan.layout)
    whole = read_adapter(small.folder / ADAPTER_FILE, small.plan.layout)
    np.testing.assert_array_equal(theta, part(whole, small.plan, frozen.plan))


def test_loss_and_gradient_are_those_of_the_whole(
    small, frozen, open_graph, random_batch, any_theta
):
    whole = read_adapter(small.folder / ADAPTER_FILE, small.plan.layout)
    moved = any_theta(small.plan, 4)
    for tensor in small.plan.layout:
        if tensor.role is not Role.LORA_A:
            where = slice(tensor.offset, tensor.offset + tensor.size)
            whole[where] = moved[where]
    batch = random_batch(small.plan, 5, 11, seed=3)
    expected = open_graph(small.folder / TRAIN_GRAPH).run(None, {"theta": whole, **batch})
    theta = part(whole, small.plan, frozen.plan)
    found = open_graph(frozen.folder / TRAIN_GRAPH).run(None, {"theta": theta, **batch})
    expected[3] = part(expected[3], small.plan, frozen.plan)
    for value, oracle in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, oracle, rtol=1e-4, atol=1e-6)


def test_base_and_adapter_together_are_pefts_adapter(
    frozen, open_graph, random_batch, peft_model, tmp_path
):
    """The base holds A under PEFT's names: what an export puts beside theta."""
    import torch
    from safetensors.numpy import load_file, save_file

    base = load_file(frozen.folder / BASE_FILE)
    a = {name: value for name, value in base.items() if name.endswith(".lora_A.weight")}
    folder = tmp_path / "adapter"
    shutil.copytree(frozen.folder, folder)
    save_file({**a, **load_file(frozen.folder / ADAPTER_FILE)}, folder / ADAPTER_FILE)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(a) == 2 * len(config["target_modules"])
    batch = random_batch(frozen.plan, 4, 9, seed=5)
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = peft_model(frozen, folder)
    with torch.no_grad():
        expected = model(**{n: torch.from_numpy(v) for n, v in tokens.items()}).logits
    found = open_graph(frozen.folder / INFER_GRAPH).run(None, tokens)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
