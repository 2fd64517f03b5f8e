"""Plans for language models train as torch + peft do and generate as transformers does."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from coordinator.plans import PlanRequest, build_plan
from edge_agent.optimisers import AdamW
from fedloom.adapters import read_adapter, write_adapter
from fedloom.errors import ConfigError
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Role, load_plan
from tests.plans.conftest import Built
from tests.plans.decoders import POSITIONS, save_decoder

pytestmark = pytest.mark.timeout(900)  # exports take half a minute of one core, here shared
SHAPES = ((4, 9), (8, 16), (3, 21), (5, 12))  # (rows, tokens)
STEPS, LEARNING_RATE = 20, 1e-3
STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"


@pytest.fixture(scope="session")
def language_model(graph_cache, tmp_path_factory):
    """Return a maker of plans by architecture; each is built once."""
    made: dict[str, Built] = {}

    def make(kind: str) -> Built:
        if kind not in made:
            model = save_decoder(kind, tmp_path_factory.mktemp("models") / f"tiny-{kind}")
            folder = tmp_path_factory.mktemp("plans") / kind
            request = PlanRequest(
                model=str(model),
                task="causal-lm",
                rank=3,
                prompt="turn {what} ",
                answer="{text}",
            )
            plan = build_plan(request, folder, lambda line: None, graph_cache)
            made[kind] = Built(folder, plan, model)
        return made[kind]

    return make


def load_peft(built: Built, adapter: Path, *, trainable: bool = False):
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        built.model, attn_implementation="eager", dtype=torch.float32
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=trainable).eval()


def random_texts(plan, rows: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Make right-padded texts whose first two tokens are a prompt, which is not learned."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, tokens + 1, rows)
    lengths[0] = tokens
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    ids = random.integers(1, plan.task.vocabulary_size, (rows, tokens)) * mask
    learned = (mask == 1) & (np.arange(tokens) >= 2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": np.where(learned, ids, -100),
        "sample_weight": np.ones(rows, np.float32),
    }


def saved_name(name: str) -> str:
    return name.replace(".default", "")


def test_twenty_steps_equal_torch_and_peft(language_model, open_graph):
    """The loss is transformers' own, labels shifted by itself."""
    import torch

    built = language_model("llama")
    session = open_graph(built.folder / TRAIN_GRAPH)
    model = load_peft(built, built.folder, trainable=True)
    saved = {saved_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    parameters = [saved[tensor.name] for tensor in built.plan.layout]
    oracle = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    theta = read_adapter(built.folder / ADAPTER_FILE, built.plan.layout)
    optimizer = AdamW(len(theta), LEARNING_RATE, 0.01)
    for step in range(STEPS):
        batch = random_texts(built.plan, *SHAPES[step % len(SHAPES)], seed=step)
        tensors = {n: torch.from_numpy(v) for n, v in batch.items() if n != "sample_weight"}
        oracle.zero_grad()
        loss = model(**tensors).loss
        loss.backward()
        same = np.concatenate([p.detach().numpy().ravel() for p in parameters])
        expected = np.concatenate([p.grad.numpy().ravel() for p in parameters])
        _, weight, _, gradient = session.run(None, {"theta": same, **batch})
        assert weight == (batch["labels"][:, 1:] != -100).sum()
        assert np.linalg.norm(gradient / weight - expected) <= 1e-4 * np.linalg.norm(expected)
        loss_sum, weight, _, gradient = session.run(None, {"theta": theta, **batch})
        assert abs(float(loss_sum / weight) - loss.item()) <= 1e-5
        optimizer.step(theta, gradient / weight)
        oracle.step()
    trained = np.concatenate([p.detach().numpy().ravel() for p in parameters])
    assert np.abs(theta - trained).max() <= 1e-3


def generated(session, plan, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Continue each row greedily with one graph for the prompt and for every token."""
    task = plan.task
    shape = (len(ids), task.heads, 0, task.head_size)
    names = [port.name for port in session.get_inputs() if port.name.startswith("past.")]
    cache = dict.fromkeys(names, np.zeros(shape, np.float32))
    found, step = [], ids
    for _ in range(count):
        logits, *present = session.run(None, {"input_ids": step, "attention_mask": mask, **cache})
        step = logits.argmax(-1)[:, None]
        found.append(step)
        cache = dict(zip(names, present, strict=True))
        mask = np.concatenate([mask, np.ones_like(step)], 1)
    return np.concatenate(found, 1)


def assert_generates_as_transformers(built: Built, open_graph, any_theta, tmp_path, count: int):
    import shutil

    import torch

    folder = tmp_path / "trained"
    shutil.copytree(built.folder, folder)
    write_adapter(folder / ADAPTER_FILE, built.plan.layout, any_theta(built.plan, 5))
    model = load_peft(built, folder)
    ids = np.random.default_rng(2).integers(4, 40, (3, 7))
    mask = np.ones_like(ids)
    mask[1, :3] = 0  # on the left: generation goes on where the text ends
    expected = model.generate(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=built.plan.task.vocabulary_size + 1,  # none: every row goes on
        pad_token_id=0,
    )[:, ids.shape[1] :]
    found = generated(open_graph(folder / GEN_GRAPH), built.plan, ids, mask, count)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neo", "gpt_neox"])
def test_greedy_tokens_are_those_of_transformers(
    kind, language_model, open_graph, any_theta, tmp_path
):
    built = language_model(kind)
    assert_generates_as_transformers(built, open_graph, any_theta, tmp_path, 12)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the model stories260K beside the project")
def test_a_published_model(graph_cache, open_graph, any_theta, tmp_path):
    folder = tmp_path / "stories"
    request = PlanRequest(model=str(STORIES), task="causal-lm", rank=4)
    plan = build_plan(request, folder, lambda line: None, graph_cache)
    assert (plan.task.layers, plan.task.heads, plan.task.head_size) == (5, 4, 8)
    assert plan.task.stop_token_ids == (2,)
    built = Built(folder, plan, STORIES)
    assert_generates_as_transformers(built, open_graph, any_theta, tmp_path, 24)


def test_a_row_means_the_same_wherever_its_padding_is(language_model, open_graph, any_theta):
    built = language_model("llama")
    session = open_graph(built.folder / INFER_GRAPH)
    ids = np.random.default_rng(1).integers(1, 40, (1, 6))
    theta = any_theta(built.plan, 3)
    feed = {"theta": theta, "input_ids": ids, "attention_mask": np.ones_like(ids)}
    plain = session.run(None, feed)[0]
    for left, right in ((4, 0), (0, 4)):
        width = ((0, 0), (left, right))
        padded = {"input_ids": np.pad(ids, width), "attention_mask": np.pad(ids * 0 + 1, width)}
        found = session.run(None, {**feed, **padded})[0]
        np.testing.assert_allclose(found[:, left : left + 6], plain, rtol=1e-4, atol=1e-5)


def test_the_task_says_what_a_device_needs(language_model):
    plan = language_model("llama").plan
    task = plan.task
    assert (task.layers, task.heads, task.head_size, task.vocabulary_size) == (2, 2, 8, 40)
    assert (task.max_tokens, task.pad_token_id, task.stop_token_ids) == (POSITIONS, 0, (3,))
    assert task.fields == ("what", "text")
    assert plan.origin.lora_targets == ("q_proj", "v_proj")
    assert {tensor.role for tensor in plan.layout} == {Role.LORA_A, Role.LORA_B}


def test_a_tied_head_is_in_the_base_once(language_model):
    from safetensors.numpy import load_file

    weights = load_file(language_model("llama").folder / BASE_FILE)
    assert [name for name, value in weights.items() if value.shape[0] == 40] == [
        "model.embed_tokens.weight"
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("name", [TRAIN_GRAPH, INFER_GRAPH, GEN_GRAPH])
def test_no_second_copy_of_a_weight_is_folded(kind, name, language_model):
    """Whatever depends on weights alone is computed, and kept, when a graph is loaded."""
    path = language_model(kind).folder / name
    onnx.checker.check_model(path)
    graph = onnx.load(path, load_external_data=False).graph
    constant = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    weights = {t.name for t in graph.initializer if t.external_data and len(t.dims) > 1}
    derived = set()
    for node in graph.node:
        if node.input and all(name in constant for name in node.input if name):
            constant |= dict.fromkeys(node.output, 0)
            if weights.intersection(node.input):
                derived.add(f"{node.op_type}({', '.join(node.input)})")
                weights.update(node.output)
    assert not derived


@pytest.mark.slow
def test_another_process_exports_the_same_bytes(language_model, tmp_path):
    """Its hashes are salted differently, so that an order taken from a set would show."""
    built = language_model("gpt2")
    code = f"""
from pathlib import Path
from coordinator.plans import PlanRequest, build_plan
request = PlanRequest(
    model={str(built.model)!r}, task="causal-lm", rank=3, prompt="turn {{what}} ", answer="{{text}}"
)
build_plan(request, Path("gpt2"), print)
"""
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    again = load_plan(tmp_path / "gpt2")
    assert again.members == built.plan.members


def test_the_trained_copy_of_a_tied_weight_is_refused(language_model, tmp_path):
    model = str(language_model("llama").model)
    request = PlanRequest(model=model, task="causal-lm", modules_to_save=("lm_head",))
    with pytest.raises(ConfigError, match="tied to another's, found lm_head"):
        build_plan(request, tmp_path / "plan", lambda line: None, None)


def test_an_encoder_is_no_language_model(bert, tmp_path):
    request = PlanRequest(model=str(bert), task="causal-lm")
    with pytest.raises(ConfigError, match="expected"):
        build_plan(request, tmp_path / "plan", lambda line: None, None)
