"""Plans for tags of words train as torch + peft do."""

import warnings

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from edge_agent.optimisers import AdamW
from fedloom.adapters import read_adapter
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, Role
from fedloom.tasks import TokenClassification

TAGS = ("O", "B-place", "I-place")
SHAPES = ((4, 9), (8, 16), (3, 21), (5, 12))  # (rows, tokens)
STEPS, LEARNING_RATE = 20, 1e-3


@pytest.fixture(scope="module")
def tagger(bert, graph_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans") / "tagger"
    request = PlanRequest(model=str(bert), task="ner", labels=TAGS, rank=4, targets=("all-linear",))
    return build_plan(request, folder, lambda line: None, graph_cache), folder


@pytest.fixture(scope="module")
def oracle(tagger, bert):
    import peft
    import transformers

    base = transformers.AutoModelForTokenClassification.from_pretrained(
        bert, num_labels=len(TAGS), attn_implementation="eager"
    )
    with warnings.catch_warnings():
        # peft still reads attributes that transformers has renamed.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return peft.PeftModel.from_pretrained(base, tagger[1], is_trainable=True).eval()


def tagged(rows: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, tokens + 1, rows)
    lengths[0] = tokens
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    first_of_word = (random.random((rows, tokens)) < 0.6) & (mask == 1)
    labels = random.integers(0, len(TAGS), (rows, tokens))
    return {
        "input_ids": random.integers(1, 21, (rows, tokens)) * mask,
        "attention_mask": mask,
        "labels": np.where(first_of_word, labels, -100),
        "sample_weight": np.ones(rows, np.float32),
    }


def test_what_is_in_the_plan(tagger):
    plan, _ = tagger
    assert plan.origin.lora_targets == ("all-linear",)
    assert plan.task == TokenClassification(TAGS, 48, 0)  # the model's limit, below the default
    # Six linear layers in each of two, A and B; the head is trained whole.
    roles = [tensor.role for tensor in plan.layout]
    assert [roles.count(role) for role in (Role.LORA_A, Role.LORA_B, Role.HEAD)] == [12, 12, 2]


def test_twenty_steps_equal_torch_and_peft(tagger, oracle, open_graph):
    import torch

    plan, folder = tagger
    session = open_graph(folder / TRAIN_GRAPH)
    named = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter
        for name, parameter in oracle.named_parameters()
        if parameter.requires_grad
    }
    parameters = [named[tensor.name] for tensor in plan.layout]
    adam = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    optimizer = AdamW(len(theta), LEARNING_RATE, 0.01)
    for step in range(STEPS):
        batch = tagged(*SHAPES[step % len(SHAPES)], seed=step)
        tensors = {n: torch.from_numpy(v) for n, v in batch.items() if n != "sample_weight"}
        adam.zero_grad()
        loss = oracle(**tensors).loss
        loss.backward()
        expected = np.concatenate([p.grad.numpy().ravel() for p in parameters])
        same = np.concatenate([p.detach().numpy().ravel() for p in parameters])
        _, weight, _, gradient = session.run(None, {"theta": same, **batch})
        assert weight == (batch["labels"] != -100).sum()
        assert np.linalg.norm(gradient / weight - expected) <= 1e-4 * np.linalg.norm(expected)
        loss_sum, weight, _, gradient = session.run(None, {"theta": theta, **batch})
        assert abs(float(loss_sum / weight) - loss.item()) <= 1e-5
        optimizer.step(theta, gradient / weight)
        adam.step()
    trained = np.concatenate([p.detach().numpy().ravel() for p in parameters])
    assert np.abs(theta - trained).max() <= 1e-3


def test_a_batch_without_any_label_is_zero(tagger, open_graph, any_theta):
    plan, folder = tagger
    batch = tagged(3, 8, seed=1)
    batch["labels"][:] = -100
    found = open_graph(folder / TRAIN_GRAPH).run(None, {"theta": any_theta(plan, 1), **batch})
    assert not any(value.any() for value in found)


def test_logits_are_for_every_token(tagger, open_graph):
    ids = np.ones((2, 7), np.int64)
    feed = {"input_ids": ids, "attention_mask": ids}
    (logits,) = open_graph(tagger[1] / INFER_GRAPH).run(None, feed)
    assert logits.shape == (2, 7, len(TAGS))
