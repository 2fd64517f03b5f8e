"""Quality of an exported model on a labelled file: from the logits of `infer.onnx` alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.batches import Examples, inference_batches
from edge_agent.data import DataSource
from edge_agent.examples import read_examples
from edge_agent.graphs import GraphSession
from edge_agent.metrics import Tally
from fedloom.adapters import read_adapter
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import infer_contract
from fedloom.plans import ADAPTER_FILE, Plan, load_plan
from fedloom.quality import local_quality, named
from fedloom.tasks import (
    IGNORED_LABEL,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)


@dataclass(frozen=True)
class ModelQuality:
    """What was found; `labels` are rows, or the tokens that a row teaches."""

    model: str
    rows: int
    broken_rows: int
    labels: int
    metrics: dict[str, float]


def measure(folder: Path, source: DataSource, threads: int = 0) -> ModelQuality:
    """Measure a model on a file that has its task's columns.

    The loss is cross-entropy in nats. A plan of values states a loss of its own, which an exported
    model does not hold: its squared error is told and no loss. Raises Refused: DATA_* as
    `read_examples`, PLAN_UNSUPPORTED, TRAINING_FAILED for a model without finite answers.
    """
    plan = load_plan(folder)
    examples, broken = read_examples(folder, plan, source)
    evaluation = _tally(folder, plan, examples, threads).evaluation()
    metrics = named(local_quality(evaluation, plan.task), plan.task)
    if isinstance(plan.task, ArrayLearning) and plan.task.values:
        del metrics["loss"]
    return ModelQuality(plan.name, len(examples), broken, evaluation.count, metrics)


def _tally(folder: Path, plan: Plan, examples: Examples, threads: int) -> Tally:
    task = plan.task
    contract = infer_contract(task, plan.parameter_count)
    session = GraphSession(folder, contract, threads, Reason.PLAN_UNSUPPORTED)
    try:
        theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    except OSError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {ADAPTER_FILE} in the folder: {error.strerror}"
        ) from error
    tally, aligned = Tally(task), _alignment(task)
    for rows in inference_batches(examples):
        (logits,) = session.run(["logits"], {"theta": theta, **examples.inputs(rows)})
        labels, logits = aligned(examples.labels(rows), logits)
        tally.add_sums(*_sums(task, labels, logits))
        tally.add_logits(labels, logits)
    return tally


_Aligned = tuple[NDArray[Any], NDArray[Any]]


def _alignment(task: Task) -> Callable[[NDArray[Any], NDArray[Any]], _Aligned]:
    """Return what puts each label beside its logits: text's come one position early."""
    if isinstance(task, CausalLanguageModelling):
        return lambda labels, logits: (labels[:, 1:], logits[:, :-1])
    return lambda labels, logits: (labels, logits)


def _sums(task: Task, labels: NDArray[Any], logits: NDArray[Any]) -> tuple[float, float, float]:
    """Return what `eval.onnx` would: loss_sum, weight_sum, correct; values have no loss here."""
    match task:
        case ArrayLearning() if task.values:
            finite = float(np.isfinite(logits).all())
            return (0.0 if finite else float("nan")), float(len(labels)), 0.0
        case (
            TextClassification()
            | TokenClassification()
            | CausalLanguageModelling()
            | ArrayLearning()
        ):
            learned = labels != IGNORED_LABEL
            return _cross_entropy(labels[learned], logits[learned].astype(np.float64))


def _cross_entropy(labels: NDArray[Any], logits: NDArray[np.float64]) -> tuple[float, float, float]:
    """`labels` (N,), `logits` (N, C)."""
    if not len(labels):
        return 0.0, 0.0, 0.0
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels[:, None], axis=-1)[:, 0]
    losses = np.log(np.exp(shifted).sum(axis=-1)) - chosen
    correct = np.count_nonzero(logits.argmax(axis=-1) == labels)
    return float(losses.sum()), float(len(labels)), float(correct)
