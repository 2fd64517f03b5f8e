"""What each task's examples are made of: rows to blocks of arrays, and the arrays to Examples."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.batches import (
    ClassifiedTexts,
    Examples,
    LabelledArrays,
    LabelledTokens,
    TokenisedTexts,
)
from edge_agent.encoders import Encoded, TextEncoder
from edge_agent.kept_examples import Arrays, Block
from edge_agent.reports import Cause, DataReport
from edge_agent.row_readers import ArrayRow, ClassifiedText, Fields, TaggedWords, Templates
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayLearning,
    CausalLanguageModelling,
    TextClassification,
    TokenClassification,
)

_BLOCK_ROWS = 1024
_BLOCK_TOKENS = 1 << 18
_BLOCK_BYTES = 1 << 20  # of arrays
T_contra = TypeVar("T_contra", contravariant=True)


class Recipe(Protocol[T_contra]):
    """How a task's rows become examples."""

    def blocks(self, rows: Iterable[T_contra], report: DataReport) -> Iterator[Block]:
        """Encode rows, some at a time; lengths and what cannot be learned go into the report."""
        ...

    def examples(self, arrays: Arrays) -> Examples:
        """Return the examples whose blocks, one after the other, are these arrays."""
        ...


@dataclass(frozen=True)
class ClassifiedTextRecipe:
    """See Recipe: text classification."""

    folder: Path
    task: TextClassification

    def blocks(self, rows: Iterable[ClassifiedText], report: DataReport) -> Iterator[Block]:
        """See Recipe."""
        encoded = TextEncoder(self.folder, self.task).classified(rows)
        return _token_blocks(encoded, np.dtype(np.int64), report)

    def examples(self, arrays: Arrays) -> Examples:
        """See Recipe."""
        return ClassifiedTexts(_texts(arrays), arrays["labels"], self.task.pad_token_id)


@dataclass(frozen=True)
class TaggedWordRecipe:
    """See Recipe: token classification."""

    folder: Path
    task: TokenClassification

    def blocks(self, rows: Iterable[TaggedWords], report: DataReport) -> Iterator[Block]:
        """See Recipe."""
        encoded = TextEncoder(self.folder, self.task).tagged(rows)
        return _token_blocks(_learnable(encoded, 0, report), np.dtype(np.int32), report)

    def examples(self, arrays: Arrays) -> Examples:
        """See Recipe."""
        return LabelledTokens(_texts(arrays), arrays["labels"], self.task.pad_token_id)


@dataclass(frozen=True)
class AnswerRecipe:
    """See Recipe: causal language modelling."""

    folder: Path
    task: CausalLanguageModelling
    templates: Templates

    def blocks(self, rows: Iterable[Fields], report: DataReport) -> Iterator[Block]:
        """See Recipe; the first token has none before it that would predict it."""
        encoded = TextEncoder(self.folder, self.task).answered(map(self.templates.filled, rows))
        return _token_blocks(_learnable(encoded, 1, report), np.dtype(np.int32), report)

    def examples(self, arrays: Arrays) -> Examples:
        """See Recipe."""
        return LabelledTokens(_texts(arrays), arrays["labels"], self.task.pad_token_id)


@dataclass(frozen=True)
class ArrayRecipe:
    """See Recipe: array learning."""

    task: ArrayLearning

    def blocks(self, rows: Iterable[ArrayRow], report: DataReport) -> Iterator[Block]:
        """See Recipe."""
        values = sum(int(np.prod(entry.shape)) for entry in self.task.inputs) + self.task.values
        kind = np.float32 if self.task.values else np.int64
        for block in _grouped(rows, max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * values)))):
            arrays: Arrays = {
                f"input.{entry.name}": np.stack([row.arrays[i] for row in block])
                for i, entry in enumerate(self.task.inputs)
            }
            yield arrays | {"labels": np.array([row.label for row in block], kind)}

    def examples(self, arrays: Arrays) -> Examples:
        """See Recipe."""
        inputs = {entry.name: arrays[f"input.{entry.name}"] for entry in self.task.inputs}
        return LabelledArrays(inputs, arrays["labels"])


def _texts(arrays: Arrays) -> TokenisedTexts:
    return TokenisedTexts(arrays["tokens"], arrays["offsets"], arrays["lengths"])


def _learnable(encoded: Iterable[Encoded], first: int, report: DataReport) -> Iterator[Encoded]:
    """Leave out rows without a label from position `first` on: a batch of them has no loss."""
    for row in encoded:
        if any(label != IGNORED_LABEL for label in row.labels[first:]):
            yield row
        else:
            report.rows -= 1
            report.broken[Cause.NOTHING_TO_LEARN] += 1


def _token_blocks(
    encoded: Iterable[Encoded], label_type: np.dtype[Any], report: DataReport
) -> Iterator[Block]:
    end = 0  # of the texts before
    for block in _by_tokens(encoded):
        lengths = np.array([len(row.ids) for row in block], np.int64)
        report.lengths.update(lengths.tolist())
        report.cut += sum(row.cut for row in block)
        ends = end + np.cumsum(lengths)
        yield {
            "tokens": _joined((row.ids for row in block), np.dtype(np.int32)),
            "labels": _joined((row.labels for row in block), label_type),
            "lengths": lengths,
            "offsets": ends if end else np.append(0, ends),
        }
        end = int(ends[-1])


def _by_tokens(encoded: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    block: list[Encoded] = []
    tokens = 0
    for row in encoded:
        block.append(row)
        tokens += len(row.ids)
        if len(block) == _BLOCK_ROWS or tokens >= _BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _joined(lists: Iterable[list[int]], kind: np.dtype[Any]) -> NDArray[Any]:
    return np.fromiter(itertools.chain.from_iterable(lists), kind)


def _grouped(rows: Iterable[ArrayRow], size: int) -> Iterator[list[ArrayRow]]:
    remaining = iter(rows)
    while block := list(itertools.islice(remaining, size)):
        yield block
