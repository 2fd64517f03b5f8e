"""The members of a plan that are not graphs: weights, adapter, tokenizer, and their digests."""

import hashlib
import json
from pathlib import Path

from coordinator.plans.model import AdaptedModel
from fedloom.adapters import write_adapter
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    TOKENIZER_FILE,
    PlanMember,
)


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
