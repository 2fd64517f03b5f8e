"""Plans that train R of W + s B R A alone: graphs, adapter and exports against torch by hand."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from coordinator.app import app
from coordinator.plans import PlanRequest, build_plan
from coordinator.plans.families import load_model
from coordinator.plans.first_gradient import lean_to_data
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.export_forms import Form, TrainedModel, export_forms
from fedloom.graph_contracts import EVAL_GRAPH, INFER_GRAPH, TRAIN_GRAPH
from fedloom.model_cards import describe
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Role
from fedloom.strategies import update_length
from fedloom.tensor_files import read_tensors
from fedloom.terms import LocalTraining, LoraRule
from tests.plans.conftest import LABELS, Built
from tests.plans.decoders import save_decoder

RANK, ALPHA = 4, 16.0
RENAMED = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def built(bert, graph_cache, tmp_path_factory) -> Built:
    """The plan of the two-layer BERT with an R in query and value of each layer."""
    folder = tmp_path_factory.mktemp("plans") / "sb"
    request = PlanRequest(
        model=str(bert), labels=LABELS, rank=RANK, alpha=ALPHA, max_tokens=32, lora="sb", dp=True
    )
    return Built(folder, build_plan(request, folder, lambda line: None, graph_cache), bert)


@pytest.fixture(scope="module")
def theta(built) -> np.ndarray:
    """A trained adapter, far from where it began."""
    initial = read_adapter(built.folder / ADAPTER_FILE, built.plan.layout)
    moved = np.random.default_rng(8).normal(0, 0.5, len(initial))
    return (initial + moved).astype(np.float32)


def tensors_of(built: Built, theta: np.ndarray, role: Role) -> dict[str, np.ndarray]:
    """Return the trained tensors of a role, by name."""
    return {
        t.name: theta[t.offset : t.offset + t.size].reshape(t.shape)
        for t in built.plan.layout
        if t.role is role
    }


def by_hand(built: Built, theta: np.ndarray):
    """Return transformers' own model whose weights are W + s B R A: no PEFT, no code of ours."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        built.model, num_labels=len(LABELS), attn_implementation="eager"
    ).eval()
    base = read_tensors(built.folder / BASE_FILE)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, r in tensors_of(built, theta, Role.LORA_R).items():
            b, a = (base[name.replace(".lora_R.", f".lora_{factor}.")] for factor in "BA")
            layer = name.removeprefix("base_model.model.").replace(".lora_R.", ".")
            weights[layer] += torch.from_numpy(ALPHA / RANK * (b @ r @ a))
        for name, values in tensors_of(built, theta, Role.HEAD).items():
            weights[name.removeprefix("base_model.model.")].copy_(torch.from_numpy(values))
    return model


def test_theta_has_r_squared_values_for_each_product_and_the_head(built):
    roles = [tensor.role for tensor in built.plan.layout]
    assert set(roles) == {Role.LORA_R, Role.HEAD}
    between = [t for t in built.plan.layout if t.role is Role.LORA_R]
    assert [t.shape for t in between] == [(RANK, RANK)] * 4
    length = update_length(LocalTraining(lora=LoraRule.FED_SB), built.plan.layout)
    assert length == 4 * RANK**2 + len(LABELS) * 33
    assert built.plan.origin.lora_a_frozen


def test_factors_are_singular_vectors_of_the_weights_they_stand_beside(built):
    """B B^T W A^T A is the best approximation of W of that rank (Eckart, Young)."""
    base = read_tensors(built.folder / BASE_FILE)
    for name in tensors_of(built, np.zeros(built.plan.parameter_count), Role.LORA_R):
        b, a = (base[name.replace(".lora_R.", f".lora_{factor}.")] for factor in "BA")
        weight = base[name.removeprefix("base_model.model.").replace(".lora_R.", ".")]
        np.testing.assert_allclose(b.T @ b, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-5)
        values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        left = weight - b @ (b.T @ weight @ a.T) @ a
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(values[RANK:]), rel=1e-4)


def test_it_begins_as_the_base_model_and_can_learn_from_there(built, open_graph, random_batch):
    initial = read_adapter(built.folder / ADAPTER_FILE, built.plan.layout)
    for r in tensors_of(built, initial, Role.LORA_R).values():
        assert not r.any()
    batch = random_batch(built.plan, 4, 9, seed=1)
    gradient = open_graph(built.folder / TRAIN_GRAPH).run(None, {"theta": initial, **batch})[3]
    for r in tensors_of(built, gradient, Role.LORA_R).values():
        assert np.abs(r).max() > 1e-4


def test_logits_loss_and_gradient_are_those_of_the_matrices_by_hand(
    built, theta, open_graph, random_batch
):
    import torch

    batch = random_batch(built.plan, 5, 11, seed=3)
    feeds = {n: torch.from_numpy(batch[n]) for n in ("input_ids", "attention_mask")}
    model = by_hand(built, theta)
    logits = model(**feeds).logits
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(batch["labels"]), reduction="none"
    )
    loss = (losses * torch.from_numpy(batch["sample_weight"])).sum()
    loss.backward()
    found = open_graph(built.folder / TRAIN_GRAPH).run(None, {"theta": theta, **batch})
    assert float(found[0]) == pytest.approx(loss.item(), rel=1e-4)
    base = read_tensors(built.folder / BASE_FILE)
    weights = dict(model.named_parameters())
    for name, slope in tensors_of(built, found[3], Role.LORA_R).items():
        b, a = (base[name.replace(".lora_R.", f".lora_{factor}.")] for factor in "BA")
        layer = name.removeprefix("base_model.model.").replace(".lora_R.", ".")
        expected = ALPHA / RANK * b.T @ weights[layer].grad.numpy() @ a.T  # chain rule
        np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)
    evaluated = open_graph(built.folder / EVAL_GRAPH).run(["logits"], {"theta": theta, **batch})
    np.testing.assert_allclose(evaluated[0], logits.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_the_mean_of_r_is_the_mean_of_products(built):
    """Fed-SB's law: sum_k p_k B R_k A = B (sum_k p_k R_k) A."""
    base, random = read_tensors(built.folder / BASE_FILE), np.random.default_rng(2)
    weights = np.array([0.2, 0.3, 0.5])
    for name in tensors_of(built, np.zeros(built.plan.parameter_count), Role.LORA_R):
        b, a = (base[name.replace(".lora_R.", f".lora_{factor}.")] for factor in "BA")
        each = random.standard_normal((3, RANK, RANK))
        mean = np.tensordot(weights, each, 1)
        expected = sum(p * (b @ r @ a) for p, r in zip(weights, each, strict=True))
        np.testing.assert_allclose(b @ mean @ a, expected, atol=1e-12)


@RENAMED
def test_every_form_of_an_export_answers_alike(
    built, theta, open_graph, random_batch, peft_model, tmp_path
):
    """PEFT gets ordinary LoRA with B R for B; merged graphs have W + s B R A."""
    import torch

    out = tmp_path / "out"
    said = describe(built.plan, None, "fedloom")
    model = TrainedModel(built.folder, built.plan, theta, said)
    export_forms(model, (Form.ONNX, Form.MERGED, Form.PEFT, Form.SAFETENSORS), out)
    batch = random_batch(built.plan, 4, 9, seed=5)
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        feeds = {name: torch.from_numpy(values) for name, values in tokens.items()}
        expected = by_hand(built, theta)(**feeds).logits.numpy()
        in_peft = peft_model(built, out / "peft")(**feeds).logits.numpy()
    merged = open_graph(out / "merged" / INFER_GRAPH).run(None, tokens)[0]
    answered = open_graph(out / INFER_GRAPH).run(None, tokens)[0]
    for found in (in_peft, merged, answered):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    names = set(read_tensors(out / "peft" / ADAPTER_FILE))
    assert not any(".lora_R." in name for name in names)
    assert sum(".lora_B." in name for name in names) == 4
    assert "R of B R A trained" in (out / "README.md").read_text()


def test_factors_follow_from_the_gradient_on_the_operators_rows(built, graph_cache, tmp_path):
    """LoRA-SB: singular vectors of sgn(sum of gradients), by transformers and numpy alone."""
    import torch
    import transformers

    rows = [("turn the light on", 0), ("set heating to warm", 1), ("play some music please", 2)] * 4
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": LABELS[label]}) for text, label in rows]
    data.write_text("\n".join(lines))
    request = PlanRequest(
        model=str(built.model), labels=LABELS, rank=2, max_tokens=32, lora="sb", init_data=data
    )
    folder = tmp_path / "plan"
    plan = build_plan(request, folder, lambda line: None, graph_cache)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        built.model, num_labels=len(LABELS), attn_implementation="eager"
    ).eval()
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    head = {
        t.name.removeprefix("base_model.model."): theta[t.offset : t.offset + t.size]
        for t in plan.layout
        if t.role is Role.HEAD
    }
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in head.items():
            weights[name].copy_(torch.from_numpy(values).reshape(weights[name].shape))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, label in rows:
        ids = torch.tensor([tokenizer.encode(text).ids])
        torch.nn.functional.cross_entropy(model(ids).logits, torch.tensor([label])).backward()
    base = read_tensors(folder / BASE_FILE)
    for tensor in (t for t in plan.layout if t.role is Role.LORA_R):
        layer = tensor.name.removeprefix("base_model.model.").replace(".lora_R.", ".")
        signs = np.sign(weights[layer].grad.numpy().astype(np.float64))
        left, _, right = np.linalg.svd(signs)
        b, a = (base[tensor.name.replace(".lora_R.", f".lora_{f}.")] for f in "BA")
        # Equal subspaces: a gradient of nearly zero may have either sign.
        assert np.linalg.norm(left[:, :2].T @ b) ** 2 == pytest.approx(2, abs=0.05)
        assert np.linalg.norm(right[:2] @ a.T) ** 2 == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("task", ["ner", "causal-lm"])
def test_rows_of_other_tasks_lead_too(bert, tmp_path_factory, task):
    """Factors move, stay orthonormal, and nothing is left that torch would train."""
    folder = tmp_path_factory.mktemp("rows")
    data = folder / "rows.jsonl"
    if task == "ner":
        rows = [{"words": ["turn", "lights", "on"], "tags": ["O", "B", "O"]}] * 3
        request = PlanRequest(model=str(bert), task=task, labels=("O", "B"), rank=3, lora="sb")
    else:  # whose weights lie the other way round
        model = save_decoder("gpt2", folder / "tiny-gpt2")
        rows = [{"q": "what is", "a": "rain today"}, {"q": "play", "a": "some music"}]
        request = PlanRequest(
            model=str(model), task=task, rank=3, lora="sb", prompt="{q} ", answer="{a}"
        )
    data.write_text("\n".join(map(json.dumps, rows)))
    adapted = load_model(request)
    before = factors_of(adapted)
    assert lean_to_data(adapted, data) == len(rows)
    between = [t for t in adapted.layout if t.role is Role.LORA_R]
    assert not any(adapted.theta[t.offset : t.offset + t.size].any() for t in between)
    for name, factor in factors_of(adapted).items():
        small = factor.T @ factor if factor.shape[1] == 3 else factor @ factor.T
        np.testing.assert_allclose(small, np.eye(3), atol=1e-5)
        assert np.abs(factor - before[name]).max() > 1e-3
    assert not any(p.requires_grad for p in adapted.network.parameters())


def factors_of(adapted) -> dict[str, np.ndarray]:
    """Return the frozen factors by name."""
    pairs = zip(adapted.frozen_names, adapted.frozen_tensors(), strict=True)
    return {name: tensor.numpy().copy() for name, tensor in pairs if ".lora_" in name}


@pytest.mark.parametrize(
    ("rows", "named"),
    [("", "expected rows"), ('{"text": "on"}', "row 1"), ('{"text": "on", "label": "x"}', "row 1")],
)
def test_rows_that_the_task_does_not_have_are_named(bert, tmp_path, rows, named):
    data = tmp_path / "rows.jsonl"
    data.write_text(rows)
    request = PlanRequest(model=str(bert), labels=LABELS, lora="sb", init_data=data)
    with pytest.raises(ConfigError, match=named):
        build_plan(request, tmp_path / "plan", lambda line: None, None)


def test_equal_requests_give_equal_bytes(built, graph_cache, tmp_path):
    request = PlanRequest(
        model=str(built.model),
        labels=LABELS,
        rank=RANK,
        alpha=ALPHA,
        max_tokens=32,
        lora="sb",
        dp=True,
        name=built.plan.name,
    )
    again = build_plan(request, tmp_path / "again", lambda line: None, graph_cache)
    assert again.encode() == built.plan.encode()


def test_what_cannot_be_built_is_named(bert, tmp_path):
    request = PlanRequest(model=str(bert), labels=LABELS, lora="sb")
    for change, named in (
        ({"freeze_a": True}, "freezes both factors"),
        ({"lora": "flora"}, "one of ab, sb"),
        ({"lora": "ab", "init_data": tmp_path}, "none without lora sb"),
    ):
        with pytest.raises(ConfigError, match=named):
            dataclasses.replace(request, **change)
    too_many = dataclasses.replace(request, rank=33)
    with pytest.raises(ConfigError, match="at most 32 with lora = sb"):
        build_plan(too_many, tmp_path / "plan", lambda line: None, None)


def test_the_command_knows_it(tmp_path):
    arguments = ("--model", "a.b:c", "--task", "module", "--out", str(tmp_path / "p"))
    result = CliRunner().invoke(app, ["plan", "build", *arguments, "--lora", "sb"])
    assert "expected none for the task module" in str(result.exception)
