"""A plan with residuals: one more tensor beside every adapted weight, and nothing else differs."""

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from edge_agent.checkpoints import Checkpoint
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.export_forms import Form, TrainedModel, export_forms
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_DP_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, Plan, Role
from fedloom.strategies.portions import parts_of
from fedloom.strategies.targets import targets_of
from fedloom.terms import LocalTraining, LoraRule
from tests.edge_agent.toy import Unkept, write_rows
from tests.plans.conftest import TEXT, Built
from tests.plans.test_torch_engine import engine_of


@pytest.fixture(scope="module")
def moved(small, graph_cache, tmp_path_factory):
    """The small plan once more, with residuals: the build compares its graphs with torch."""
    folder = tmp_path_factory.mktemp("plans") / "residual"
    request = PlanRequest(
        model=str(small.model),
        labels=small.plan.task.labels,
        rank=4,
        max_tokens=32,
        residual=True,
        dp=True,
    )
    return Built(folder, build_plan(request, folder, print, graph_cache), small.model)


def test_the_layout_has_a_residual_for_every_pair(small, moved):
    whole = small.plan.layout
    assert moved.plan.layout[: len(whole)] == whole
    assert moved.plan.trained_count == small.plan.parameter_count
    targets = targets_of(moved.plan.layout)
    assert len(targets) == len(moved.plan.layout) - len(whole)
    for target in targets:
        assert target.residual.role is Role.RESIDUAL
        assert target.residual.name == target.a.name.replace("lora_A", "residual")
    theta = read_adapter(moved.folder / ADAPTER_FILE, moved.plan.layout)
    assert not theta[moved.plan.trained_count :].any()


def test_a_residual_is_added_to_its_weight(moved, open_graph, random_batch, any_theta, peft_model):
    """The oracle is PEFT's model with other weights, under the names of its own."""
    import torch

    theta, plan = any_theta(moved.plan, 4), moved.plan
    adapter = moved.folder.parent / "adapter"
    model = TrainedModel(moved.folder, plan, without_residuals(theta, plan), "")
    export_forms(model, (Form.PEFT,), adapter)
    network = peft_model(moved, adapter / "peft")
    modules = dict(network.named_modules())
    with torch.no_grad():
        for target in targets_of(plan.layout):
            residual = target.residual
            values = theta[residual.offset : residual.offset + residual.size]
            layer = modules[residual.name.removesuffix(".residual.weight")]
            layer.base_layer.weight += torch.from_numpy(values.reshape(residual.shape))
        batch = random_batch(plan, 5, 11, seed=3)
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        asked = {name: torch.from_numpy(value) for name, value in tokens.items()}
        expected = network(**asked).logits.numpy()
    found = open_graph(moved.folder / INFER_GRAPH).run(None, {"theta": theta, **tokens})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def without_residuals(theta: np.ndarray, plan: Plan) -> np.ndarray:
    """Return the same model as the server had not moved any weight."""
    values = theta.copy()
    values[plan.trained_count :] = 0
    return values


def test_gradients_are_of_what_is_trained_alone(moved, open_graph, random_batch, any_theta):
    theta, count = any_theta(moved.plan, 6), moved.plan.trained_count
    batch = random_batch(moved.plan, 4, 9, seed=5)
    gradient = open_graph(moved.folder / TRAIN_GRAPH).run(["grad_sum"], {"theta": theta, **batch})[
        0
    ]
    clip = {"clip": np.array(1e9, np.float32)}
    clipped = open_graph(moved.folder / TRAIN_DP_GRAPH).run(
        ["clipped_grad_sum"], {"theta": theta, **batch, **clip}
    )[0]
    assert gradient.shape == clipped.shape == (count,)
    np.testing.assert_allclose(clipped, gradient, rtol=1e-3, atol=1e-4)
    assert gradient.any()


@pytest.mark.parametrize("lora", [LoraRule.FEDEX, LoraRule.FEDIT])
def test_engines_train_beside_a_residual_and_leave_it(moved, tmp_path, any_theta, lora):
    words, labels = TEXT.split(), moved.plan.task.labels
    rows = [(" ".join(words[i % 7 : i % 7 + 3 + i % 5]), labels[i % 4]) for i in range(16)]
    data = write_rows(tmp_path / "train.csv", rows)
    terms = LocalTraining(epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.1, lora=lora)
    parts, theta = parts_of(terms, moved.plan.layout, 0), any_theta(moved.plan, 6)
    deltas = []
    for name in ("onnx", "torch"):
        engine = engine_of(name, moved.folder, moved.plan, data)
        update = engine.train(theta, terms, 5, lambda _: None, Unkept(), None, parts)
        assert update.delta.shape == theta.shape
        assert not update.delta[moved.plan.trained_count :].any()
        deltas.append(update.delta)
    assert np.linalg.norm(deltas[0] - deltas[1]) < 1e-3 * np.linalg.norm(deltas[0])
    assert np.linalg.norm(deltas[0]) > 0


def test_a_training_that_was_cut_goes_on_beside_a_residual(moved, tmp_path, any_theta):
    rows = [(word, moved.plan.task.labels[i % 4]) for i, word in enumerate(TEXT.split())]
    data = write_rows(tmp_path / "train.csv", rows)
    terms = LocalTraining(local_steps=4, batch_size=4, lora=LoraRule.FLORA)
    parts, theta = parts_of(terms, moved.plan.layout, 0), any_theta(moved.plan, 6)
    engine = engine_of("onnx", moved.folder, moved.plan, data)
    whole = engine.train(theta, terms, 5, lambda _: None, Unkept(), None, parts).delta

    class Cut(Exception):
        """The process ends."""

    def stop(share: float) -> None:
        if share >= 0.5:
            raise Cut

    clock = iter(range(0, 10_000_000, 1000))
    checkpoint = Checkpoint(tmp_path, bytes(16), 1, lambda: float(next(clock)))
    with pytest.raises(Cut):
        engine.train(theta, terms, 5, stop, checkpoint, None, parts)
    again, seen = Checkpoint(tmp_path, bytes(16), 1), []
    resumed = engine.train(theta, terms, 5, seen.append, again, None, parts).delta
    assert seen[0] >= 0.25
    np.testing.assert_array_equal(resumed, whole)


def test_a_residual_needs_an_a_that_moves():
    with pytest.raises(ConfigError, match="freeze_a"):
        PlanRequest(model="m", labels=("a", "b"), residual=True, freeze_a=True)
    with pytest.raises(ConfigError, match="residual"):
        PlanRequest(model="package.module:factory", task="module", residual=True)
