"""What a plan is trained for, as frozen values with their limits; `plan.proto` says what they mean.

A task decides what a row of an agent's data is and which inputs the plan's graphs take.
"""

import math
import re
from dataclasses import dataclass

from fedloom.errors import Reason, Refused
from fedloom.v1 import plan_pb2

MAX_LABELS = 65_536
MAX_TOKENS = 131_072
MAX_VOCABULARY = 2**24
MAX_TEMPLATE = 16_384  # characters
MAX_STOP_TOKENS = 16
MAX_ARRAYS = 16
MAX_ROW_VALUES = 2**24  # of one array of a row
MAX_AXES = 8  # of one row's array
MAX_LAYERS = 1_024
MAX_HEADS = 1_024
MAX_HEAD_SIZE = 4_096
IGNORED_LABEL = -100  # at a position that is not learned
_ARRAY_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TAKEN_NAMES = frozenset(("theta", "labels", "sample_weight", "clip"))
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.-]{0,63})\}")


@dataclass(frozen=True)
class TextClassification:
    """Text in, one of `labels` out; texts are cut to `max_tokens` tokens."""

    labels: tuple[str, ...]
    max_tokens: int
    pad_token_id: int

    def __post_init__(self) -> None:
        _check_labels(self.labels)
        _check_tokens(self.max_tokens)


@dataclass(frozen=True)
class TokenClassification:
    """Words in, one of `labels` out for each; texts are cut to `max_tokens` tokens."""

    labels: tuple[str, ...]
    max_tokens: int
    pad_token_id: int

    def __post_init__(self) -> None:
        _check_labels(self.labels)
        _check_tokens(self.max_tokens)


@dataclass(frozen=True)
class CausalLanguageModelling:
    """Text in, its continuation out: `prompt` is given and `answer` learned, both templates.

    `layers`, `heads` and `head_size` are the extents of the key-value cache.
    """

    max_tokens: int
    pad_token_id: int
    vocabulary_size: int
    layers: int
    heads: int
    head_size: int
    prompt: str = ""
    answer: str = "{text}"
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_tokens(self.max_tokens)
        for name, most in (
            ("vocabulary_size", MAX_VOCABULARY),
            ("layers", MAX_LAYERS),
            ("heads", MAX_HEADS),
            ("head_size", MAX_HEAD_SIZE),
        ):
            found = getattr(self, name)
            _require(1 <= found <= most, f"{name} in 1..{most}", found)
        length = max(len(self.prompt), len(self.answer))
        _require(length <= MAX_TEMPLATE, f"templates of at most {MAX_TEMPLATE} characters", length)
        _require(bool(template_fields(self.answer)), "an answer with a {COLUMN}", "none")
        count = len(self.stop_token_ids)
        _require(count <= MAX_STOP_TOKENS, f"at most {MAX_STOP_TOKENS} stop tokens", count)
        for token in (self.pad_token_id, *self.stop_token_ids):
            _require(0 <= token < self.vocabulary_size, "tokens of the vocabulary", token)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns that a row needs, in order of their first appearance."""
        return tuple(dict.fromkeys(template_fields(self.prompt) + template_fields(self.answer)))


@dataclass(frozen=True)
class ArrayInput:
    """One of the arrays that a row is made of; `shape` is one row's, of float32."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        usable = _ARRAY_NAME.fullmatch(self.name) and self.name not in _TAKEN_NAMES
        _require(bool(usable), "a name such as features", repr(self.name[:80]))
        _require(len(self.shape) <= MAX_AXES, f"at most {MAX_AXES} axes", len(self.shape))
        fits = all(1 <= extent <= MAX_ROW_VALUES for extent in self.shape)
        fits = fits and math.prod(self.shape) <= MAX_ROW_VALUES
        _require(fits, f"positive extents and at most {MAX_ROW_VALUES} values", self.shape)


@dataclass(frozen=True)
class ArrayLearning:
    """Numbers in; one of `labels` out, or `values` numbers when there are no labels."""

    inputs: tuple[ArrayInput, ...]
    labels: tuple[str, ...] = ()
    values: int = 0

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.inputs]
        _require(1 <= len(names) <= MAX_ARRAYS, f"1..{MAX_ARRAYS} inputs", len(names))
        _require(len(set(names)) == len(names), "inputs of distinct names", names)
        if self.values:
            _require(self.values <= MAX_LABELS, f"at most {MAX_LABELS} values", self.values)
            _require(not self.labels, "labels or values", "both")
        else:
            _check_labels(self.labels)

    @property
    def logits(self) -> int:
        """C: number of classes, or of values."""
        return self.values or len(self.labels)


Task = TextClassification | TokenClassification | CausalLanguageModelling | ArrayLearning
_NAMES: dict[type[Task], str] = {
    TextClassification: "text_classification",
    TokenClassification: "token_classification",
    CausalLanguageModelling: "causal_language_modelling",
    ArrayLearning: "array_learning",
}


def task_name(task: Task) -> str:
    """Return the name of the task's arm in `plan.proto`."""
    return _NAMES[type(task)]


def template_fields(template: str) -> list[str]:
    """Return the {COLUMN} names of a template, in order."""
    return _FIELD.findall(template)


def fill_template(template: str, row: dict[str, str]) -> str:
    """Put a row's values in place of the {COLUMN} names; other braces stay as they are."""
    return _FIELD.sub(lambda match: row[match[1]], template)


def read_task(message: plan_pb2.Plan) -> Task:
    """Validate a plan message's task; raises Refused(MALFORMED or PLAN_UNSUPPORTED)."""
    match message.WhichOneof("task"):
        case "text_classification":
            text = message.text_classification
            return TextClassification(tuple(text.labels), text.max_tokens, text.pad_token_id)
        case "token_classification":
            token = message.token_classification
            return TokenClassification(tuple(token.labels), token.max_tokens, token.pad_token_id)
        case "causal_language_modelling":
            lm = message.causal_language_modelling
            return CausalLanguageModelling(
                lm.max_tokens,
                lm.pad_token_id,
                lm.vocabulary_size,
                lm.layers,
                lm.heads,
                lm.head_size,
                lm.prompt,
                lm.answer,
                tuple(lm.stop_token_ids),
            )
        case "array_learning":
            arrays = message.array_learning
            _require(len(arrays.inputs) <= MAX_ARRAYS, "fewer inputs", len(arrays.inputs))
            inputs = tuple(ArrayInput(entry.name, tuple(entry.shape)) for entry in arrays.inputs)
            return ArrayLearning(inputs, tuple(arrays.labels), arrays.values)
        case found:
            raise Refused(
                Reason.PLAN_UNSUPPORTED,
                f"expected a task that this version knows, found {found}",
            )


def write_task(task: Task, message: plan_pb2.Plan) -> None:
    """Put a task into a plan message."""
    match task:
        case TextClassification():
            message.text_classification.labels.extend(task.labels)
            message.text_classification.max_tokens = task.max_tokens
            message.text_classification.pad_token_id = task.pad_token_id
        case TokenClassification():
            message.token_classification.labels.extend(task.labels)
            message.token_classification.max_tokens = task.max_tokens
            message.token_classification.pad_token_id = task.pad_token_id
        case CausalLanguageModelling():
            lm = message.causal_language_modelling
            lm.max_tokens, lm.pad_token_id = task.max_tokens, task.pad_token_id
            lm.vocabulary_size = task.vocabulary_size
            lm.prompt, lm.answer = task.prompt, task.answer
            lm.stop_token_ids.extend(task.stop_token_ids)
            lm.layers, lm.heads, lm.head_size = task.layers, task.heads, task.head_size
        case ArrayLearning():
            arrays = message.array_learning
            arrays.labels.extend(task.labels)
            arrays.values = task.values
            arrays.SetInParent()
            for entry in task.inputs:
                arrays.inputs.add(name=entry.name, shape=entry.shape)


def unsupported(task: Task, what: str) -> Refused:
    """Return the refusal to do `what` with a task of that kind."""
    return Refused(
        Reason.PLAN_UNSUPPORTED, f"expected a plan for {what}, found {type(task).__name__}"
    )


def _check_labels(labels: tuple[str, ...]) -> None:
    count = len(labels)
    _require(2 <= count <= MAX_LABELS, f"2..{MAX_LABELS} labels", count)
    _require(len(set(labels)) == count, "distinct labels", labels[:8])
    _require(all(labels), "labels that are not empty", "an empty one")


def _check_tokens(max_tokens: int) -> None:
    _require(2 <= max_tokens <= MAX_TOKENS, f"max_tokens in 2..{MAX_TOKENS}", max_tokens)


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {what}, found {found}")
