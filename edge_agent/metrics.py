"""What is counted on held-out rows beyond sums of losses: from labels and logits, of any engine.

Classes (labels): a row is right, or false for the class that was predicted and missed for its own.
Tags: entities of all kinds together. An entity is right if its kind, its first and its last word
are, as seqeval counts and, before it, CoNLL-2000's conlleval: B-x begins an entity, and so does an
I-x that goes on with nothing; S- and E- end one (IOBES). A tag without such a prefix is a kind.
Values: squared errors.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused
from fedloom.quality import Counts, Evaluation
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)

SUMS = ("loss_sum", "weight_sum", "correct")
_OUTSIDE = "O"
_PREFIXES = ("B", "I", "E", "S")


def evaluation_outputs(task: Task) -> tuple[str, ...]:
    """Return what is needed of `eval.onnx`, in order; not text's logits, which are large."""
    return SUMS if isinstance(task, CausalLanguageModelling) else (*SUMS, "logits")


class Tally:
    """Counts over the batches of one evaluation."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._loss = self._weight = self._correct = self._squared = 0.0
        size = len(task.labels) if isinstance(task, TextClassification | ArrayLearning) else 1
        self._counts = np.zeros((3, size), np.int64)  # right, false, missed
        self._tags = Tags(task.labels if isinstance(task, TokenClassification) else ())

    def add_sums(self, loss: float, weight: float, correct: float) -> None:
        """Add what `eval.onnx` gives for a batch."""
        self._loss += loss
        self._weight += weight
        self._correct += correct

    def add_logits(self, labels: NDArray[Any], logits: NDArray[Any]) -> None:
        """Count a batch: `labels` as the task's graphs take them, `logits` as they give them."""
        match self._task:
            case ArrayLearning() if self._task.values:
                errors = np.square(logits.astype(np.float64) - labels)
                self._squared += float(errors.mean(axis=1).sum())
            case TextClassification() | ArrayLearning():
                learned = labels != IGNORED_LABEL
                self._count_classes(labels[learned], logits.argmax(axis=-1)[learned])
            case TokenClassification():
                self._count_entities(labels, logits.argmax(axis=-1))
            case CausalLanguageModelling():
                pass

    def evaluation(self) -> Evaluation:
        """Return what was found; raises Refused(TRAINING_FAILED) where the model has diverged."""
        if not (math.isfinite(self._loss) and self._weight > 0):
            raise Refused(
                Reason.TRAINING_FAILED,
                f"expected a finite loss on held-out data, found {self._loss} over "
                f"{self._weight:.0f} labels",
            )
        counted = not isinstance(self._task, CausalLanguageModelling) and not _learns_values(
            self._task
        )
        right, false, missed = (tuple(row.tolist()) for row in self._counts)
        return Evaluation(
            round(self._weight),
            round(self._correct),
            self._loss / self._weight,
            Counts(right, false, missed) if counted else Counts(),
            self._squared / self._weight,
        )

    def _count_classes(self, labels: NDArray[Any], predicted: NDArray[Any]) -> None:
        size = self._counts.shape[1]
        right = labels == predicted
        for row, found in enumerate((labels[right], predicted[~right], labels[~right])):
            self._counts[row] += np.bincount(found, minlength=size)

    def _count_entities(self, labels: NDArray[Any], predicted: NDArray[Any]) -> None:
        for row, tags in zip(labels, predicted, strict=True):
            words = row != IGNORED_LABEL
            expected, found = (self._tags.entities(t[words]) for t in (row, tags))
            right = len(expected & found)
            self._counts[:, 0] += (right, len(found) - right, len(expected) - right)


class Tags:
    """The tags of a plan, as entities' beginnings, ends and kinds."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        parts = [_parts(label) for label in labels]
        prefixes, kinds = [prefix for prefix, _ in parts], [kind for _, kind in parts]
        names = sorted({kind for kind in kinds if kind})
        self._kind = np.array([names.index(kind) if kind else -1 for kind in kinds])  # (C,)
        self._begins = np.array([prefix in ("B", "S") for prefix in prefixes])  # (C,)
        self._ends = np.array([prefix in ("E", "S") for prefix in prefixes])  # (C,)

    def entities(self, tags: NDArray[Any]) -> set[tuple[int, int, int]]:
        """Return (kind, first word, last word) of each entity of a text; `tags` (W,) are labels."""
        if not len(tags):
            return set()
        kind, begins, ends = self._kind[tags], self._begins[tags], self._ends[tags]
        inside = kind >= 0
        goes_on = np.zeros(len(tags), bool)
        goes_on[1:] = (kind[1:] == kind[:-1]) & ~begins[1:] & ~ends[:-1]
        first = np.flatnonzero(inside & ~goes_on)
        stops = inside & ~np.append(goes_on[1:], False)
        return set(
            zip(kind[first].tolist(), first.tolist(), np.flatnonzero(stops).tolist(), strict=True)
        )


def _parts(tag: str) -> tuple[str, str]:
    """Return a tag's prefix and kind; no kind for what is outside."""
    if tag == _OUTSIDE:
        return "", ""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and kind and prefix in _PREFIXES else ("", tag)


def _learns_values(task: Task) -> bool:
    return isinstance(task, ArrayLearning) and bool(task.values)
