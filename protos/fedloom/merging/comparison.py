"""A merged model against the graphs that take theta: the same inputs to both, before it appears."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import GEN_GRAPH, INFER_GRAPH
from fedloom.plans import Plan
from fedloom.tasks import ArrayLearning, CausalLanguageModelling
from fedloom.tensor_files import Array

_SHAPES = ((2, 8), (5, 24), (64, 11), (64, 18))  # (batch, sequence)
_ROWS = 64  # of arrays
_FEW_IDS = 2  # any vocabulary has more

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Agreement:
    """How near a merged model's answers are to the adapter's, over positions that are seen."""

    relative_error: float  # L2 norm of the difference of all logits over that of the logits
    same_answer: float  # share of positions with the same largest logit; 1 for learned values

    def __str__(self) -> str:
        return f"relative error {self.relative_error:.1e}, same answer {self.same_answer:.1%}"


@dataclass(frozen=True)
class Bounds:
    """What a merged model must keep."""

    relative_error: float
    same_answer: float = 0.0

    def check(self, form: str, found: Agreement) -> None:
        """Raise Refused(PLAN_UNSUPPORTED) for less; NaN is less."""
        near = found.relative_error <= self.relative_error
        if not near or not found.same_answer >= self.same_answer:
            expected = Agreement(self.relative_error, self.same_answer)
            raise Refused(
                Reason.PLAN_UNSUPPORTED,
                f"expected {form} to answer as the adapter does within: {expected}; found: {found}",
            )


def compare(source: Path, plan: Plan, theta: Theta, vocabulary: int | None, out: Path) -> Agreement:
    """Run the graphs of `out` and, with theta, those of `source` on inputs made up here."""
    differences, sizes, same, count = 0.0, 0.0, 0, 0
    for expected, found in _answers(source, plan, theta, vocabulary, out):
        differences += float(np.square(found - expected, dtype=np.float64).sum())
        sizes += float(np.square(expected, dtype=np.float64).sum())
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count += expected[..., 0].size
    values = isinstance(plan.task, ArrayLearning) and not plan.task.labels
    error = float(np.sqrt(differences / sizes)) if sizes else float(differences)
    return Agreement(error, 1.0 if values else same / count)


def _answers(
    source: Path, plan: Plan, theta: Theta, vocabulary: int | None, out: Path
) -> Iterator[tuple[Array, Array]]:
    """Yield pairs of logits (..., C), those of padding left out."""
    ids = _FEW_IDS if vocabulary is None else vocabulary
    adapter, merged = _open(source / INFER_GRAPH), _open(out / INFER_GRAPH)
    for feeds in _inputs(plan, ids):
        (expected,) = adapter.run(["logits"], {"theta": theta, **feeds})
        (found,) = merged.run(["logits"], feeds)
        if expected.ndim == 3:  # (B, S, C)
            seen = feeds["attention_mask"] == 1
            expected, found = expected[seen], found[seen]
        yield expected, found
    if isinstance(plan.task, CausalLanguageModelling) and (out / GEN_GRAPH).exists():
        yield from _generated(source, plan.task, theta, ids, out)


def _generated(
    source: Path, task: CausalLanguageModelling, theta: Theta, ids: int, out: Path
) -> Iterator[tuple[Array, Array]]:
    """Each graph goes on from a cache of its own."""
    adapter, merged = _open(source / GEN_GRAPH), _open(out / GEN_GRAPH)
    names = [port.name for port in merged.get_inputs()][2:]
    empty = np.zeros((3, task.heads, 0, task.head_size), np.float32)
    caches = [[empty] * len(names), [empty] * len(names)]
    tokens = np.random.default_rng(5).integers(0, ids, (3, 6))
    for start, end in ((0, 4), (4, 5), (5, 6)):
        mask = np.ones((3, end), np.int64)
        feeds: Feeds = {"input_ids": tokens[:, start:end], "attention_mask": mask}
        answers = []
        for index, (session, given) in enumerate(((adapter, {"theta": theta}), (merged, {}))):
            past = dict(zip(names, caches[index], strict=True))
            logits, *caches[index] = session.run(None, {**given, **feeds, **past})
            answers.append(logits)
        yield answers[0], answers[1]


def _inputs(plan: Plan, ids: int) -> Iterator[Feeds]:
    random = np.random.default_rng(7)
    task = plan.task
    if isinstance(task, ArrayLearning):
        yield {
            entry.name: random.standard_normal((_ROWS, *entry.shape), np.float32)
            for entry in task.inputs
        }
        return
    for batch, tokens in _SHAPES:
        tokens = min(tokens, task.max_tokens)
        lengths = random.integers(max(1, tokens // 2), tokens + 1, (batch, 1))
        mask = (np.arange(tokens) < lengths).astype(np.int64)
        chosen = random.integers(0, ids, (batch, tokens))
        yield {"input_ids": np.where(mask, chosen, task.pad_token_id), "attention_mask": mask}


def _open(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's classes derive from Exception alone
        problem = str(error).replace(str(path), path.name)[:200]
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            f"expected ONNX Runtime to load {path.name}, found: {problem}",
        ) from error
