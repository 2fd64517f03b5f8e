"""The members of a plan that are not graphs: weights, adapter, tokenizer, and their digests."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tokenizers
import transformers
from transformers.utils.hub import cached_file

from coordinator.plans.model import AdaptedModel, ModelSource
from fedloom.adapters import adapter_header, write_adapter
from fedloom.errors import ConfigError
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    TOKENIZER_FILE,
    PlanMember,
    TrainableTensor,
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer in the format of Hugging Face tokenizers, and the id that fills short rows."""

    text: str
    pad_token_id: int


def load_tokenizer(source: ModelSource, vocabulary: int) -> TextTokenizer:
    """Load the model's tokenizer without truncation and padding, which are the agent's choice.

    `vocabulary` is the number of rows of the embedding.
    """
    try:
        path = cached_file(source.location, TOKENIZER_FILE) or ""  # None only where asked for
        pad_token_id = transformers.AutoTokenizer.from_pretrained(source.location).pad_token_id
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model",
            f"expected {TOKENIZER_FILE} beside the model {source.name}; an older tokenizer gets "
            "one from transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        ) from error
    if pad_token_id is None:
        raise ConfigError("model", f"expected the tokenizer of {source.name} to have a pad token")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocabulary:
        raise ConfigError(
            "model",
            f"expected a tokenizer of at most {vocabulary} tokens (the embedding's rows), "
            f"found {size}",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextTokenizer(tokenizer.to_str(), pad_token_id)


def frozen_layout(adapted: AdaptedModel, used: set[str]) -> tuple[TrainableTensor, ...]:
    """Lay out the weights that some graph uses, in the model's order; offsets count values."""
    layout: list[TrainableTensor] = []
    offset = 0
    for name, weight in zip(adapted.frozen_names, adapted.frozen_tensors(), strict=True):
        if name in used:
            layout.append(TrainableTensor(name, tuple(weight.shape), offset))
            offset += weight.numel()
    return tuple(layout)


def write_base(folder: Path, adapted: AdaptedModel, layout: tuple[TrainableTensor, ...]) -> None:
    """Write `base.safetensors`: float32, contiguous, one copy of each weight of `layout`."""
    weights = dict(zip(adapted.frozen_names, adapted.frozen_tensors(), strict=True))
    with (folder / BASE_FILE).open("wb") as file:
        file.write(adapter_header(layout))
        for tensor in layout:
            file.write(weights[tensor.name].contiguous().numpy().astype("<f4", copy=False).data)


def write_adapter_files(folder: Path, adapted: AdaptedModel, base_model: str) -> None:
    """Write the initial adapter and PEFT's description of it."""
    write_adapter(folder / ADAPTER_FILE, adapted.layout, adapted.theta)
    network: Any = adapted.network
    config: peft.PeftConfig = network.peft_config["default"]
    described = config.to_dict() | {
        "base_model_name_or_path": base_model,  # transformers puts the machine's path here
        "inference_mode": True,
    }
    for key in ("modules_to_save", "target_modules"):  # sets come in the order of the day
        described[key] = sorted(set(described[key]))
    text = json.dumps(described, sort_keys=True, indent=2)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def member(folder: Path, name: str) -> PlanMember:
    """Measure one file of a plan."""
    path = folder / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return PlanMember(name, path.stat().st_size, digest)


def write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    """Write `tokenizer.json`."""
    (folder / TOKENIZER_FILE).write_text(tokenizer.text, encoding="utf-8")
