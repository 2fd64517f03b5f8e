"""The first step of full fine-tuning, from which LoRA-SB takes its factors (arXiv:2411.19557v4).

    Delta W = - eta sgn(sum_i grad_W L(W, x_i))        what Adam's first step is
    U S V^T = Delta W,   B = U[:, :r],   A = V[:, :r]^T

for each adapted W, over an operator's own few rows: one JSON object a line, with `text` and
`label`, `words` and `tags`, or the columns of a language model's templates. Deviation: R begins
with zero, since how long a step is belongs to a run. So - eta drops out.

B and A go to every device in the plan: rows must be such that all may know what they lean to.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer

from coordinator.plans.lora_sb import set_factors
from coordinator.plans.model import AdaptedModel, BoundNetwork
from fedloom.errors import ConfigError
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayLearning,
    CausalLanguageModelling,
    TextClassification,
    TokenClassification,
)

MAX_ROWS = 1024  # that are read; LoRA-SB needs a thousandth of a data set
_ROWS_AT_ONCE = 8
_TextTask = TextClassification | TokenClassification | CausalLanguageModelling
_Row = tuple[list[int], list[int]]  # token ids; a label, or one for each of them


def lean_to_data(adapted: AdaptedModel, data: Path) -> int:
    """Set the adapter's frozen factors by the rows of a file, in place; return how many they are.

    Raises ConfigError for rows that the task does not have.
    """
    layers = [one for one in adapted.network.modules() if isinstance(one, LoraLayer)]
    weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
    rows = list(_rows(adapted, data))
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in _batches(adapted, rows):
            labels, counts = batch.pop("labels"), batch.pop("sample_weight")
            logits = adapted.family.logits(BoundNetwork(adapted.network, {}), batch)
            adapted.family.sums(logits, labels, counts).loss.backward()  # type: ignore[no-untyped-call]
        for layer, weight in zip(layers, weights, strict=True):
            set_factors(layer, torch.sign(weight.grad))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    return len(rows)


def _rows(adapted: AdaptedModel, data: Path) -> Iterator[_Row]:
    task, tokenizer = adapted.task, adapted.tokenizer
    if isinstance(task, ArrayLearning) or tokenizer is None:
        raise ConfigError("init_data", "expected none for a task without an adapter, found one")
    encoder = Tokenizer.from_str(tokenizer.text)
    try:
        with data.open(encoding="utf-8") as file:
            lines = list(islice((line for line in file if line.strip()), MAX_ROWS))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(data), f"cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield _encoded(encoder, task, json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                str(data), f"row {number}: expected what the task learns from, as JSON ({error!r})"
            ) from error
    if not lines:
        raise ConfigError(str(data), "expected rows, found none")


def _encoded(encoder: Tokenizer, task: _TextTask, row: dict[str, Any]) -> _Row:
    match task:
        case TextClassification():
            ids = encoder.encode(row["text"]).ids[: task.max_tokens]
            return ids, [task.labels.index(row["label"])]
        case TokenClassification():
            found = encoder.encode(list(row["words"]), is_pretokenized=True)
            tags = [task.labels.index(tag) for tag in row["tags"]]
            before = [None, *found.word_ids[:-1]]
            first = [
                IGNORED_LABEL if word is None or word == last else tags[word]
                for word, last in zip(found.word_ids, before, strict=True)
            ]
            return found.ids[: task.max_tokens], first[: task.max_tokens]
        case CausalLanguageModelling():
            prompt = encoder.encode(task.prompt.format_map(row), add_special_tokens=False).ids
            answer = encoder.encode(task.answer.format_map(row), add_special_tokens=False).ids
            answer += task.stop_token_ids[:1]
            labels = [IGNORED_LABEL] * len(prompt) + answer
            return (prompt + answer)[: task.max_tokens], labels[: task.max_tokens]


def _batches(adapted: AdaptedModel, rows: Sequence[_Row]) -> Iterator[dict[str, torch.Tensor]]:
    padding = adapted.task.pad_token_id  # type: ignore[union-attr] # of a text task
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        longest = max(len(ids) for ids, _ in some)
        each = len(some[0][1]) > 1 or not isinstance(adapted.task, TextClassification)
        yield {
            "input_ids": _filled([ids for ids, _ in some], longest, padding),
            "attention_mask": _filled([[1] * len(ids) for ids, _ in some], longest, 0),
            "labels": _filled([labels for _, labels in some], longest, IGNORED_LABEL)
            if each
            else torch.tensor([labels[0] for _, labels in some]),
            "sample_weight": torch.ones(len(some)),
        }


def _filled(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
