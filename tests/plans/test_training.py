"""`train.onnx` is torch + peft's training step, whatever the shape of the batch."""

import numpy as np
import pytest

from edge_agent.optimisers import AdamW
from fedloom.adapters import read_adapter
from fedloom.graph_contracts import TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE

SHAPES = ((4, 9), (8, 16), (3, 21), (5, 12))  # (rows, tokens)
STEPS = 20
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


@pytest.fixture(scope="module")
def train(small, open_graph):
    return open_graph(small.folder / TRAIN_GRAPH)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class PeftTrainer:
    """The oracle: a loaded PEFT model, its own loss and torch's AdamW."""

    def __init__(self, model, layout) -> None:
        import torch

        self.model = model
        named = dict(model.named_parameters())
        saved = {self._saved_name(name): p for name, p in named.items() if p.requires_grad}
        assert set(saved) == {tensor.name for tensor in layout}
        self.parameters = [saved[tensor.name] for tensor in layout]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    @staticmethod
    def _saved_name(name: str) -> str:
        return name.replace(".modules_to_save.default", "").replace(".default", "")

    def theta(self) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in self.parameters])

    def gradient(self, batch) -> tuple[float, np.ndarray]:
        import torch

        tensors = {name: torch.from_numpy(batch[name]) for name in batch if name != "sample_weight"}
        self.optimizer.zero_grad()
        loss = self.model(**tensors).loss
        loss.backward()
        return loss.item(), np.concatenate([p.grad.numpy().ravel() for p in self.parameters])


@pytest.mark.parametrize("name", ["small", "minilm"])
def test_twenty_steps_equal_torch_and_peft(name, request, open_graph, random_batch, peft_model):
    built = request.getfixturevalue(name)
    session = open_graph(built.folder / TRAIN_GRAPH)
    oracle = PeftTrainer(peft_model(built, built.folder, trainable=True), built.plan.layout)
    theta = read_adapter(built.folder / ADAPTER_FILE, built.plan.layout)
    np.testing.assert_array_equal(theta, oracle.theta())
    optimizer = AdamW(len(theta), LEARNING_RATE, WEIGHT_DECAY)
    worst = {"loss": 0.0, "gradient": 0.0}
    for step in range(STEPS):
        batch = random_batch(built.plan, *SHAPES[step % len(SHAPES)], seed=step)
        loss, gradient = oracle.gradient(batch)
        _, _, _, same_theta = session.run(None, {"theta": oracle.theta(), **batch})
        rows = len(batch["labels"])
        worst["gradient"] = max(worst["gradient"], relative(same_theta / rows, gradient))
        loss_sum, weight_sum, _, grad_sum = session.run(None, {"theta": theta, **batch})
        worst["loss"] = max(worst["loss"], abs(float(loss_sum / weight_sum) - loss))
        optimizer.step(theta, grad_sum / weight_sum)
        oracle.optimizer.step()
    difference = float(np.abs(theta - oracle.theta()).max())
    print(f"{name}: {worst}, theta {difference:.1e}")
    assert worst["loss"] <= 1e-5
    assert worst["gradient"] <= 1e-4
    assert difference <= 1e-3


def test_sums_over_micro_batches_are_the_batch(train, small, random_batch, any_theta):
    theta = any_theta(small.plan, 1)
    batch = random_batch(small.plan, 9, 14, seed=1)
    batch["sample_weight"] = np.linspace(0.2, 2.0, 9, dtype=np.float32)
    whole = train.run(None, {"theta": theta, **batch})
    parts = [
        train.run(None, {"theta": theta, **{name: v[rows] for name, v in batch.items()}})
        for rows in (slice(0, 1), slice(1, 4), slice(4, 9))
    ]
    for index, expected in enumerate(whole):
        found = sum(part[index] for part in parts)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing(train, small, random_batch, any_theta):
    theta = any_theta(small.plan, 2)
    batch = random_batch(small.plan, 4, 10, seed=2)
    padded = dict(batch)
    extra = np.zeros((4, 7), np.int64)
    padded["input_ids"] = np.concatenate([batch["input_ids"], extra + 9], 1)  # any id will do
    padded["attention_mask"] = np.concatenate([batch["attention_mask"], extra], 1)
    for found, expected in zip(
        train.run(None, {"theta": theta, **padded}),
        train.run(None, {"theta": theta, **batch}),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("empty_row", [False, True])
def test_rows_of_weight_zero_contribute_nothing(train, small, random_batch, any_theta, empty_row):
    theta = any_theta(small.plan, 3)
    batch = random_batch(small.plan, 4, 10, seed=3)
    batch["sample_weight"][3] = 0.0
    if empty_row:
        batch["attention_mask"][3] = 0
    without = {name: values[:3] for name, values in batch.items()}
    found = train.run(None, {"theta": theta, **batch})
    for value, expected in zip(found, train.run(None, {"theta": theta, **without}), strict=True):
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_counts_are_weighted(train, small, random_batch, any_theta):
    theta = any_theta(small.plan, 4)
    batch = random_batch(small.plan, 6, 8, seed=4)
    batch["sample_weight"] = np.float32([0.5, 1, 2, 0, 1, 1])
    _, weight_sum, _, _ = train.run(None, {"theta": theta, **batch})
    assert weight_sum == np.float32(5.5)
    by_class = []
    for label in range(len(small.plan.task.labels)):
        labels = np.full(6, label, np.int64)
        by_class.append(train.run(["correct"], {"theta": theta, **batch, "labels": labels})[0])
    assert sum(by_class) == pytest.approx(5.5)  # every row is right for exactly one label
