"""Every form of an export answers as the plan's graph does with the trained theta."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from coordinator.plans import PlanRequest, build_plan
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.export_forms import Form, TrainedModel, export_forms
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH
from fedloom.model_cards import describe
from fedloom.plans import ADAPTER_FILE, TOKENIZER_FILE, BaseStorage, Role
from fedloom.tasks import ArrayLearning, CausalLanguageModelling
from tests.plans.conftest import Built
from tests.plans.decoders import save_decoder

# peft still reads attributes that transformers has renamed.
RENAMED = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
KINDS = ("encoder", "frozen A", "4 bits", "decoder", "arrays", "residual", "decoder, residual")


@dataclasses.dataclass(frozen=True)
class Case:
    """A plan, the theta that was trained, and everything that was exported of it."""

    built: Built
    theta: np.ndarray
    out: object

    @property
    def is_rounded(self) -> bool:
        return self.built.plan.base_storage is not BaseStorage.FP32

    @property
    def peft_bound(self) -> float:
        """PEFT gets the base as it was before it was rounded."""
        return 0.5 if self.is_rounded else 1e-4

    @property
    def feeds(self):
        """Inputs that no comparison of the exporter's has seen."""
        random, task = np.random.default_rng(99), self.built.plan.task
        if isinstance(task, ArrayLearning):
            return {e.name: random.standard_normal((9, *e.shape), np.float32) for e in task.inputs}
        mask = np.ones((4, 10), np.int64)
        mask[1, 6:] = mask[3, 2:] = 0
        return {"input_ids": random.integers(1, 21, (4, 10)) * mask, "attention_mask": mask}


def build(kind: str, small: Built, graph_cache, factory) -> Built:
    if kind == "encoder":
        return small
    folder = factory.mktemp("plans") / "plan"
    model = small.model
    encoder = PlanRequest(model=str(model), labels=small.plan.task.labels, rank=4, max_tokens=32)
    if kind == "frozen A":
        request = dataclasses.replace(encoder, freeze_a=True)
    elif kind == "4 bits":
        request = dataclasses.replace(encoder, base=BaseStorage.INT4)
    elif kind == "residual":
        request = dataclasses.replace(encoder, base=BaseStorage.INT4, residual=True)
    elif kind.startswith(
        "decoder"
    ):  # its weights lie transposed, and its head is tied to its embeddings
        model = save_decoder("gpt2", factory.mktemp("models") / "tiny-gpt2")
        residual = "residual" in kind
        request = PlanRequest(model=str(model), task="causal-lm", rank=3, residual=residual)
    else:
        request = PlanRequest(model="tests.plans.networks:mlp", task="module")
    return Built(folder, build_plan(request, folder, lambda line: None, graph_cache), model)


def trained(built: Built, theta: np.ndarray) -> TrainedModel:
    return TrainedModel(built.folder, built.plan, theta, describe(built.plan, None, "fedloom"))


@pytest.fixture(scope="module", params=KINDS)
def case(request, small, graph_cache, any_theta, tmp_path_factory) -> Case:
    built = build(request.param, small, graph_cache, tmp_path_factory)
    forms = tuple(f for f in Form if f is not Form.PEFT or built.plan.origin.lora_rank)
    theta = any_theta(built.plan, 5)
    out = tmp_path_factory.mktemp("exports") / "model"
    export_forms(trained(built, theta), forms, out)
    return Case(built, theta, out)


def seen(logits: np.ndarray, feeds) -> np.ndarray:
    return logits[feeds["attention_mask"] == 1] if logits.ndim == 3 else logits


def answers(case: Case, open_graph) -> np.ndarray:
    session = open_graph(case.built.folder / INFER_GRAPH)
    (logits,) = session.run(None, {"theta": case.theta, **case.feeds})
    return seen(logits, case.feeds)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# merged


def test_a_merged_graph_needs_no_theta_and_answers_alike(case, open_graph):
    session = open_graph(case.out / "merged" / INFER_GRAPH)
    assert [port.name for port in session.get_inputs()] == list(case.feeds)
    assert not session.get_overridable_initializers()
    found = seen(session.run(None, case.feeds)[0], case.feeds)
    assert relative(found, answers(case, open_graph)) < 1e-5


def test_a_merged_graph_has_no_more_products_than_the_base(case):
    """Every low-rank product is gone: two for each B."""
    adapters = [t for t in case.built.plan.layout if t.role is Role.LORA_B]
    counts = [
        sum(
            node.op_type in ("Gemm", "MatMul")
            for node in onnx.load(folder / INFER_GRAPH, load_external_data=False).graph.node
        )
        for folder in (case.built.folder, case.out / "merged")
    ]
    assert counts[0] - counts[1] == 2 * len(adapters)


def test_merged_weights_are_one_file_of_plain_tensors(case):
    folder = case.out / "merged"
    weights = load_file(folder / "weights.safetensors")
    for path in folder.glob("*.onnx"):
        assert path.stat().st_size < 40_000
        for tensor in onnx.load(path).graph.initializer:
            if tensor.name in weights:
                np.testing.assert_array_equal(
                    onnx.numpy_helper.to_array(tensor), weights[tensor.name]
                )


def test_a_merged_generator_goes_on_alike(case, open_graph):
    task = case.built.plan.task
    if not isinstance(task, CausalLanguageModelling):
        assert not (case.out / "merged" / GEN_GRAPH).exists()
        return
    tokens = case.feeds["input_ids"][:1]
    empty = np.zeros((1, task.heads, 0, task.head_size), np.float32)
    logits = []
    for folder, given in ((case.built.folder, {"theta": case.theta}), (case.out / "merged", {})):
        session = open_graph(folder / GEN_GRAPH)
        names = [port.name for port in session.get_inputs() if port.name.startswith("past")]
        cache = [empty] * len(names)
        for start, end in ((0, 6), (6, 7), (7, 10)):
            feeds = {
                "input_ids": tokens[:, start:end],
                "attention_mask": np.ones((1, end), np.int64),
            }
            past = dict(zip(names, cache, strict=True))
            last, *cache = session.run(None, {**given, **feeds, **past})
        logits.append(last)
    assert relative(logits[1], logits[0]) < 1e-5


def test_integers_answer_nearly_alike(case, open_graph):
    session = open_graph(case.out / "merged-int8" / INFER_GRAPH)
    assert [port.name for port in session.get_inputs()] == list(case.feeds)
    found = seen(session.run(None, case.feeds)[0], case.feeds)
    assert relative(found, answers(case, open_graph)) < 0.1
    model = onnx.load(case.out / "merged-int8" / INFER_GRAPH)
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max((np.prod(t.dims) for t in floats if len(t.dims) == 2), default=0) < 1024


def test_a_merged_model_that_answers_otherwise_does_not_appear(case, tmp_path):
    """LoRA's scale is a wrong one here."""
    plan = case.built.plan
    if not plan.origin.lora_rank:
        pytest.skip("nothing is added up")
    origin = dataclasses.replace(plan.origin, lora_alpha=1.5 * plan.origin.lora_alpha)
    wrong = dataclasses.replace(plan, origin=origin)
    model = dataclasses.replace(trained(case.built, case.theta), plan=wrong)
    for form in (Form.MERGED, Form.MERGED_INT8):
        with pytest.raises(
            Refused, match="expected merged to answer as the adapter does"
        ) as caught:
            export_forms(model, (form,), tmp_path / "out")
        assert caught.value.reason is Reason.PLAN_UNSUPPORTED
    assert not list(tmp_path.iterdir())


# PEFT and plain tensors


@RENAMED
def test_peft_loads_the_adapter_and_answers_alike(case, open_graph):
    if not case.built.plan.origin.lora_rank:
        assert not (case.out / "peft").exists()
        return
    import peft
    import torch
    import transformers

    is_decoder = isinstance(case.built.plan.task, CausalLanguageModelling)
    auto = (
        transformers.AutoModelForCausalLM
        if is_decoder
        else transformers.AutoModelForSequenceClassification
    )
    labels = {} if is_decoder else {"num_labels": len(case.built.plan.task.labels)}
    torch.manual_seed(1234)  # what the adapter does not bring would be random
    base = auto.from_pretrained(case.built.model, attn_implementation="eager", **labels)
    model = peft.PeftModel.from_pretrained(base, case.out / "peft").eval()
    feeds = case.feeds
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(v) for name, v in feeds.items()}).logits.numpy()
    assert relative(seen(logits, feeds), answers(case, open_graph)) < case.peft_bound
    said = "Trained on weights stored as int4" in (case.out / "README.md").read_text()
    assert said is case.is_rounded


def test_peft_gets_every_pair_whole_and_nothing_else(case):
    if not case.built.plan.origin.lora_rank:
        with pytest.raises(ConfigError, match="LoRA"):
            export_forms(trained(case.built, case.theta), (Form.PEFT,), case.out.parent / "peft")
        return
    names = set(load_file(case.out / "peft" / ADAPTER_FILE))
    pairs = {n.replace(".lora_B.", ".lora_A.") for n in names if ".lora_B." in n}
    layout = case.built.plan.layout
    assert names == {t.name for t in layout if t.role is not Role.RESIDUAL} | pairs
    card = (case.out / "README.md").read_text()
    for said in ("factored into this adapter", "PEFT leaves the residuals out"):
        assert (said in card) is any(tensor.role is Role.RESIDUAL for tensor in layout)


def test_plain_tensors_are_theta(case):
    tensors = load_file(case.out / "safetensors" / "trained.safetensors")
    assert set(tensors) == {tensor.name for tensor in case.built.plan.layout}
    for tensor in case.built.plan.layout:
        expected = case.theta[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        np.testing.assert_array_equal(tensors[tensor.name], expected)
    is_text = not isinstance(case.built.plan.task, ArrayLearning)
    assert (case.out / "safetensors" / TOKENIZER_FILE).exists() is is_text


# the card


@RENAMED
def test_the_card_s_snippets_run_and_agree(case, monkeypatch, tmp_path):
    """The base model lies under its name where the snippets run, as a hub's would."""
    for path in case.out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if case.built.plan.origin.lora_rank:
        (tmp_path / case.built.plan.origin.base_model).symlink_to(case.built.model)
    monkeypatch.chdir(tmp_path)
    card = (case.out / "README.md").read_text()
    snippets = dict(re.findall(r"### ([a-z0-9-]+)\n.*?```python\n(.*?)```", card, re.DOTALL))
    found = {}
    for form, code in snippets.items():
        variables: dict = {}
        exec(compile(code, form, "exec"), variables)  # noqa: S102 - our own card's
        found[form] = variables.get("logits")
        if form == "safetensors":
            assert len(variables["trained"]) == len(case.built.plan.layout)
        elif form == "peft":
            found[form] = found[form].detach().numpy()
    for form in set(found) - {"safetensors", "merged-int8", "onnx"}:
        bound = case.peft_bound if form == "peft" else 1e-4
        assert relative(found[form], found["onnx"]) < bound, form
    assert relative(found["merged-int8"], found["onnx"]) < 0.2
    assert len(snippets) == 4 + bool(case.built.plan.origin.lora_rank)


# refusals


def test_without_onnx_the_extra_is_named(case, monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.startswith("fedloom.merging")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = trained(case.built, case.theta)
    with pytest.raises(ConfigError, match=r"onnx is not installed.*fedloom\[export\]"):
        export_forms(model, (Form.MERGED,), tmp_path / "out")
    export_forms(model, (Form.ONNX, Form.SAFETENSORS), tmp_path / "out")


def test_merging_loads_nothing_of_torch():
    program = (
        "import sys, fedloom.export_forms; before = set(sys.modules); import fedloom.merging;"
        "print(*before & {'onnx', 'onnxruntime'});"
        "print(*set(sys.modules) & {'torch', 'transformers', 'peft', 'safetensors'})"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert not result.stdout.split()
