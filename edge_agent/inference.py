"""Answer on the device: a model for each task, over one session that any number of adapters share.

An adapter is theta, an input of the graph; the models hold what belongs to the plan and take theta
with every call. ONNX Runtime's sessions and these models may be used by several threads at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from edge_agent.batches import ClassifiedTexts, TokenisedTexts
from edge_agent.encoders import TextEncoder, checked_text, load_tokenizer
from edge_agent.entities import Entity, Word, merge_tags, split_words
from edge_agent.generation import LanguageModel
from edge_agent.graphs import GraphSession, batched_logits, log_softmax, require_runtime
from fedloom.adapters import Theta, read_adapter
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import infer_contract
from fedloom.plans import ADAPTER_FILE, Plan, load_plan
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)

_MAX_ROWS = 64  # arrays in one run of the graph


@dataclass(frozen=True)
class Prediction:
    """The label of one row, and the probabilities of all labels in the plan's order."""

    label: str
    probability: float
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    def most_probable(self, count: int) -> dict[str, float]:
        """Return the `count` most probable labels, the best first."""
        order = sorted(range(len(self.labels)), key=lambda i: -self.probabilities[i])
        return {self.labels[i]: self.probabilities[i] for i in order[:count]}


@dataclass(frozen=True)
class Entities:
    """What was found in one text."""

    entities: tuple[Entity, ...]


@dataclass(frozen=True)
class Values:
    """The numbers that a plan without labels gives for one row."""

    values: tuple[float, ...]


Answer = Prediction | Entities | Values


class TextClassifier:
    """Texts in, a label for each out."""

    def __init__(
        self, folder: Path, task: TextClassification, parameters: int, threads: int = 0
    ) -> None:
        self.task = task
        self._encoder = TextEncoder(folder, task)
        self._session = _session(folder, task, parameters, threads)

    def answer(self, theta: Theta, texts: Sequence[object]) -> list[Prediction]:
        """Return one prediction for each text, in their order; raises Refused(MALFORMED)."""
        given = [checked_text(text) for text in texts]
        tokenised = TokenisedTexts.from_ids(self._encoder.ids(given))
        unknown = np.full(len(given), IGNORED_LABEL)
        examples = ClassifiedTexts(tokenised, unknown, self.task.pad_token_id)
        answers: dict[int, Prediction] = {}
        for rows, logits in batched_logits(self._session, theta, examples):
            predictions = _predictions(self.task.labels, logits)
            answers |= dict(zip(rows.tolist(), predictions, strict=True))
        return [answers[row] for row in range(len(given))]


class TokenTagger:
    """Texts in, entities out; one that is longer than the model reads is looked at in parts.

    A text may come as words, too, which are then taken as they are.
    """

    def __init__(
        self, folder: Path, task: TokenClassification, parameters: int, threads: int = 0
    ) -> None:
        self.task = task
        self._tokenizer = load_tokenizer(folder)
        self._tokenizer.enable_truncation(task.max_tokens)
        self._tokenizer.no_padding()
        self._session = _session(folder, task, parameters, threads)

    def answer(self, theta: Theta, texts: Sequence[object]) -> list[Entities]:
        """Return what was found in each text, in their order; raises Refused(MALFORMED)."""
        return [self._entities(theta, _text_and_words(text)) for text in texts]

    def _entities(self, theta: Theta, given: tuple[str, list[Word]]) -> Entities:
        text, words = given
        if not words:
            return Entities(())
        encoding = self._tokenizer.encode([word.text for word in words], is_pretokenized=True)
        found: dict[int, tuple[Word, str, float]] = {}
        for part in (encoding, *encoding.overflowing):
            for word, label, probability in self._tags(theta, part):
                found.setdefault(word, (words[word], label, probability))
        return Entities(tuple(merge_tags(text, found.values())))

    def _tags(self, theta: Theta, part: Encoding) -> Iterator[tuple[int, str, float]]:
        """Yield (word, tag, probability) for each word that begins here, or goes on."""
        input_ids = np.array([part.ids], np.int64)
        feeds = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        (logits,) = self._session.run(["logits"], {"theta": theta, **feeds})
        first: dict[int, int] = {}  # word -> its first token, which carries its tag
        for place, word in enumerate(part.word_ids):
            if word is not None:
                first.setdefault(word, place)
        logs = log_softmax(logits[0].astype(np.float64)[list(first.values())])
        for word, row in zip(first, logs, strict=True):
            best = int(row.argmax())
            yield word, self.task.labels[best], float(np.exp(row[best]))


class ArrayModel:
    """Rows of numbers in, labels or values out."""

    def __init__(
        self, folder: Path, task: ArrayLearning, parameters: int, threads: int = 0
    ) -> None:
        self.task = task
        self._session = _session(folder, task, parameters, threads)

    def answer(self, theta: Theta, rows: Sequence[object]) -> list[Prediction] | list[Values]:
        """Return an answer for each row, in their order; raises Refused(MALFORMED)."""
        arrays = [_arrays(self.task, row) for row in rows]
        found: list[NDArray[np.float64]] = []
        for start in range(0, len(arrays), _MAX_ROWS):
            part = arrays[start : start + _MAX_ROWS]
            feeds = {
                entry.name: np.stack([row[entry.name] for row in part])
                for entry in self.task.inputs
            }
            (logits,) = self._session.run(["logits"], {"theta": theta, **feeds})
            found.append(logits.astype(np.float64))
        logits = np.concatenate(found) if found else np.zeros((0, self.task.logits))
        if self.task.values:
            return [Values(tuple(row)) for row in logits.tolist()]
        return _predictions(self.task.labels, logits)


Model = TextClassifier | TokenTagger | ArrayModel | LanguageModel


def load_model(folder: Path, plan: Plan, threads: int = 0, prompt: str | None = None) -> Model:
    """Load what answers for a plan; raises Refused(PLAN_UNSUPPORTED).

    `prompt` is the template that this device trains a language model with in the plan's place.
    """
    require_runtime(plan.base_storage)
    match plan.task:
        case TextClassification() as task:
            return TextClassifier(folder, task, plan.parameter_count, threads)
        case TokenClassification() as task:
            return TokenTagger(folder, task, plan.parameter_count, threads)
        case ArrayLearning() as task:
            return ArrayModel(folder, task, plan.parameter_count, threads)
        case CausalLanguageModelling() as task:
            task = task if prompt is None else replace(task, prompt=prompt)
            return LanguageModel(folder, task, plan.parameter_count, threads)


@dataclass(frozen=True)
class Adapter:
    """A model and the theta that it answers with: one version, whatever becomes active later."""

    name: str
    version: int  # 0: of a folder that is no version of this device's
    plan: Plan
    theta: Theta
    model: Model


def load_exported(folder: Path, threads: int = 0) -> Adapter:
    """Load a folder that a person names; Refused(PLAN_MISMATCH, PLAN_UNSUPPORTED or MALFORMED)."""
    plan = load_plan(folder)
    theta = read_theta(folder, plan)
    return Adapter(plan.name, 0, plan, theta, load_model(folder, plan, threads))


def read_theta(folder: Path, plan: Plan) -> Theta:
    """Read an exported model's adapter; raises Refused(PLAN_MISMATCH or MALFORMED)."""
    try:
        return read_adapter(folder / ADAPTER_FILE, plan.layout)
    except OSError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {ADAPTER_FILE} in the folder: {error.strerror}"
        ) from error


def _session(folder: Path, task: Task, parameters: int, threads: int) -> GraphSession:
    graph = infer_contract(task, parameters)
    return GraphSession(folder, graph, threads, Reason.PLAN_UNSUPPORTED)


def _predictions(labels: tuple[str, ...], logits: NDArray[np.float64]) -> list[Prediction]:
    """(B, C) logits."""
    found = []
    for row in np.exp(log_softmax(logits)):
        best = int(row.argmax())
        found.append(Prediction(labels[best], float(row[best]), labels, tuple(row.tolist())))
    return found


def _text_and_words(given: object) -> tuple[str, list[Word]]:
    """Words that were given stand in a text of their own, one blank between them."""
    if isinstance(given, str):
        return given, split_words(checked_text(given))
    if not isinstance(given, list):
        raise _expected("a text or a list of words", given)
    words, start = [], 0
    for word in map(checked_text, given):
        words.append(Word(word, start, start + len(word)))
        start += len(word) + 1
    return " ".join(word.text for word in words), words


def _arrays(task: ArrayLearning, row: object) -> dict[str, NDArray[np.float32]]:
    """Check one row: an object with an array for each input, or the array of the only one."""
    if not isinstance(row, Mapping):
        if len(task.inputs) > 1:
            raise _expected(f"an object with {[entry.name for entry in task.inputs]}", row)
        row = {task.inputs[0].name: row}
    names = [entry.name for entry in task.inputs]
    if sorted(row) != sorted(names):
        raise _expected(f"arrays {names}", sorted(row))
    return {entry.name: _array(row[entry.name], entry.shape, entry.name) for entry in task.inputs}


def _array(values: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # is infinite then, and refused
            array = np.asarray(values, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise _expected(f"{name}: numbers of shape {list(shape)}", values) from error
    if array.shape != shape or not np.isfinite(array).all():
        raise Refused(
            Reason.MALFORMED,
            f"expected {name}: finite numbers of shape {list(shape)}, found {list(array.shape)}",
        )
    return array


def _expected(what: str, found: object) -> Refused:
    return Refused(Reason.MALFORMED, f"expected {what}, found {type(found).__name__}")
