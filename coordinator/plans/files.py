"""The members of a plan that are not graphs: weights, adapter, tokenizer, and their digests."""

import hashlib
import json
from pathlib import Path

from coordinator.plans.model import AdaptedModel
from fedloom.adapters import adapter_header, write_adapter
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    TOKENIZER_FILE,
    PlanMember,
    TrainableTensor,
)


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
    if not layout:
        return  # everything is trained
    weights = dict(zip(adapted.frozen_names, adapted.frozen_tensors(), strict=True))
    with (folder / BASE_FILE).open("wb") as file:
        file.write(adapter_header(layout))
        for tensor in layout:
            file.write(weights[tensor.name].contiguous().numpy().astype("<f4", copy=False).data)


def write_adapter_files(folder: Path, adapted: AdaptedModel) -> None:
    """Write the initial adapter and, where there is one, PEFT's description of it."""
    write_adapter(folder / ADAPTER_FILE, adapted.layout, adapted.theta)
    if adapted.adapter_config is not None:
        text = json.dumps(adapted.adapter_config, sort_keys=True, indent=2)
        (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def member(folder: Path, name: str) -> PlanMember:
    """Measure one file of a plan."""
    path = folder / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return PlanMember(name, path.stat().st_size, digest)


def write_tokenizer(folder: Path, adapted: AdaptedModel) -> None:
    """Write `tokenizer.json` for models of text."""
    if adapted.tokenizer is not None:
        (folder / TOKENIZER_FILE).write_text(adapted.tokenizer.text, encoding="utf-8")
