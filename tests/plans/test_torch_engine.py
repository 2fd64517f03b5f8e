"""Built plans in torch: the updates of ONNX Runtime, without transformers or train.onnx."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from edge_agent.data import DataSource
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import read_adapter
from fedloom.errors import Reason
from fedloom.graph_contracts import TRAIN_GRAPH, eval_contract
from fedloom.plans import ADAPTER_FILE, BaseStorage, Plan
from fedloom.tasks import IGNORED_LABEL
from fedloom.terms import LocalTraining, Optimizer
from tests.edge_agent.toy import Unkept, write_rows
from tests.plans.conftest import TEXT, save_tokenizer

STEPS = 20
UPDATE_TOLERANCE = 1e-4  # relative L2 after 20 steps; 8e-7 was seen
TERMS = LocalTraining(epochs=5, batch_size=8, learning_rate=1e-3, weight_decay=0.01)


@pytest.fixture
def data(tmp_path: Path, small) -> DataSource:
    words, labels = TEXT.split(), small.plan.task.labels
    rows = [(" ".join(words[i % 7 : i % 7 + 3 + i % 12]), labels[i % 4]) for i in range(32)]
    return write_rows(tmp_path / "train.csv", rows)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def engine_of(name: str, folder: Path, plan: Plan, data: DataSource):
    from edge_agent.torch_engine import TorchEngine

    if name == "onnx":
        return OnnxEngine(folder, plan, data, data, threads=1)
    return TorchEngine(folder, plan, data, data, threads=1, device="cpu")


@pytest.mark.parametrize("terms", [TERMS, replace(TERMS, optimizer=Optimizer.SGD)], ids=str)
def test_twenty_steps_give_the_same_update(small, data: DataSource, terms: LocalTraining) -> None:
    theta = read_adapter(small.folder / ADAPTER_FILE, small.plan.layout)
    onnx_engine, torch_engine = (
        engine_of(name, small.folder, small.plan, data) for name in ("onnx", "torch")
    )
    steps: list[float] = []
    expected = onnx_engine.train(theta, terms, 1, steps.append, Unkept())
    found = torch_engine.train(theta, terms, 1, lambda share: None, Unkept())
    assert len(steps) == STEPS
    difference = relative(found.delta, expected.delta)
    print(f"{terms.optimizer.name}: {difference:.1e}")
    assert difference < UPDATE_TOLERANCE
    assert found.mean_loss == pytest.approx(expected.mean_loss, rel=1e-5)
    here, there = (engine.evaluate(theta) for engine in (onnx_engine, torch_engine))
    assert (here.count, here.correct) == (there.count, there.correct)
    assert here.mean_loss == pytest.approx(there.mean_loss, rel=1e-5)


def test_an_accelerator_gets_all_that_it_needs(small, random_batch) -> None:
    from tests.engines.one_device import gradient_shape

    theta = read_adapter(small.folder / ADAPTER_FILE, small.plan.layout)
    feeds = {"theta": theta, **random_batch(small.plan, 3, 9, seed=1)}
    assert gradient_shape(small.folder, small.plan, feeds) == theta.shape


@pytest.mark.slow
def test_a_language_models_gradient_is_the_graphs(
    tmp_path: Path, graph_cache: Path, open_graph, any_theta
) -> None:
    """Rotary positions, grouped heads, a causal mask: what no encoder has."""
    import torch
    import transformers

    from edge_agent.torch_graph import TorchGraph
    from tests.engines.one_device import gradient_shape

    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    request = PlanRequest(model=str(tmp_path / "model"), task="causal-lm", rank=4, max_tokens=32)
    folder = tmp_path / "plan"
    plan = build_plan(request, folder, lambda line: None, graph_cache)
    mask = (np.arange(13) < np.array([13, 5, 3, 9, 12])[:, None]).astype(np.int64)
    ids = np.random.default_rng(2).integers(1, 21, mask.shape) * mask
    feeds = {
        "theta": any_theta(plan, 1),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": np.where(mask == 1, ids, IGNORED_LABEL),
        "sample_weight": np.linspace(0.5, 2, 5, dtype=np.float32),
    }
    names = ("loss_sum", "weight_sum", "correct")
    *sums, gradient = open_graph(folder / TRAIN_GRAPH).run([*names, "grad_sum"], feeds)
    contract = eval_contract(plan.task, plan.parameter_count)
    graph = TorchGraph(folder, plan, contract, torch.device("cpu"))
    tensors = {name: torch.tensor(values) for name, values in feeds.items()}
    theta = tensors["theta"].requires_grad_()
    found = graph.run(names, tensors, Reason.TRAINING_FAILED)
    np.testing.assert_allclose([value.item() for value in found], sums, rtol=1e-5)
    (own,) = torch.autograd.grad(found[0], theta)
    assert relative(own.numpy(), gradient) < 1e-5
    assert gradient_shape(folder, plan, feeds) == gradient.shape


@pytest.mark.parametrize("base", [BaseStorage.INT8, BaseStorage.INT4], ids=str)
def test_a_quantised_base_trains_as_in_onnx_runtime(
    base: BaseStorage, small, data: DataSource, tmp_path: Path, graph_cache: Path
) -> None:
    request = PlanRequest(
        model=str(small.model), labels=small.plan.task.labels, rank=4, max_tokens=32, base=base
    )
    folder = tmp_path / "plan"
    plan = build_plan(request, folder, lambda line: None, graph_cache)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    expected, found, whole = (
        engine.train(theta, TERMS, 1, lambda share: None, Unkept()).delta
        for engine in (
            engine_of("onnx", folder, plan, data),
            engine_of("torch", folder, plan, data),
            engine_of("torch", small.folder, small.plan, data),
        )
    )
    assert relative(found, expected) < UPDATE_TOLERANCE
    assert relative(whole, expected) > UPDATE_TOLERANCE
