"""Decoders classify as transformers' do, on a base that a language model's plan shares."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from coordinator.plans.families import load_model
from fedloom.adapters import write_adapter
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Plan, Role
from tests.plans.conftest import LABELS, Built
from tests.plans.decoders import save_decoder

pytestmark = pytest.mark.timeout(900)  # exports take half a minute of one core, here shared


@pytest.fixture(scope="session")
def classifier(graph_cache, tmp_path_factory):
    """Return a maker of plans by architecture; each is built once."""
    made: dict[str, Built] = {}

    def make(kind: str) -> Built:
        if kind not in made:
            model = save_decoder(kind, tmp_path_factory.mktemp("models") / f"tiny-{kind}")
            folder = tmp_path_factory.mktemp("plans") / kind
            request = PlanRequest(model=str(model), labels=LABELS, rank=3, dp=kind == "llama")
            made[kind] = Built(
                folder, build_plan(request, folder, lambda line: None, graph_cache), model
            )
        return made[kind]

    return make


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neo", "gpt_neox"])
def test_each_row_is_read_at_its_last_token(
    kind, classifier, peft_model, open_graph, any_theta, tmp_path
):
    """torch sees each row alone and without padding, so that no token marks an end."""
    import shutil

    import torch

    built = classifier(kind)
    folder = tmp_path / "trained"
    shutil.copytree(built.folder, folder)
    theta = any_theta(built.plan, 4)
    write_adapter(folder / ADAPTER_FILE, built.plan.layout, theta)
    model = peft_model(built, folder)
    lengths = (9, 4, 1)
    ids = np.random.default_rng(1).integers(1, 40, (3, 9))
    mask = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int64)
    session = open_graph(folder / INFER_GRAPH)
    (found,) = session.run(None, {"theta": theta, "input_ids": ids, "attention_mask": mask})
    for row, length, logits in zip(ids, lengths, found, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.from_numpy(row[None, :length])).logits[0]
        np.testing.assert_allclose(logits, alone.numpy(), rtol=1e-4, atol=1e-5)


def test_the_head_and_lora_are_trained(classifier):
    built = classifier("llama")
    assert {tensor.role for tensor in built.plan.layout} == {Role.LORA_A, Role.LORA_B, Role.HEAD}
    assert built.plan.task.labels == LABELS
    assert (built.folder / TRAIN_GRAPH).is_file()


def test_one_base_for_both_tasks(classifier, graph_cache, tmp_path):
    """A language model with a tied head has the very same frozen weights."""
    built = classifier("llama")
    request = PlanRequest(model=str(built.model), task="causal-lm", rank=2)
    folder = tmp_path / "reply"
    reply = build_plan(request, folder, lambda line: None, graph_cache)
    assert base_of(reply) == base_of(built.plan)
    assert digest(folder / BASE_FILE) == digest(built.folder / BASE_FILE)


def base_of(plan: Plan) -> str:
    [member] = [member for member in plan.members if member.name == BASE_FILE]
    return member.sha256.hex()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_tokenizer_without_a_pad_token_will_do(tmp_path):
    import json

    model = save_decoder("gpt2", tmp_path / "model")
    for name, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        values = json.loads((model / name).read_text())
        values.pop(key, None)
        (model / name).write_text(json.dumps(values))
    adapted = load_model(PlanRequest(model=str(model), labels=LABELS))
    batch = adapted.family.example(3, 8, seed=1)
    _, logits = adapted.family.expected(adapted.network, batch)
    assert logits.shape == (3, len(LABELS))
