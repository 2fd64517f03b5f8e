"""What a model is worth on held-out rows: how it is reported, and how it travels under protection.

An update is what the run's strategy sends, and behind it a tail of shares in 0..1, each times the
cohort's clip, which is the largest value that an update can carry:

    t                training loss / bound
    p                1 with held-out rows, 0 without, and then zeros to the end
    l                loss / bound
    a                predictions that are right             (labels, tags, text)
    e                mean squared error / bound             (values)
    r_c, f_c, m_c    by class c: right, false, missed       (labels: of the rows; tags: one class,
                                                             of the words: entities)

All but t are of the state that the round began with; what exceeds its bound is cut. The sum opens
to weighted means as it does for all values, over those who have held-out rows once divided by p:

    loss = bound * mean(l) / mean(p)            F1_c = 2 r_c / (2 r_c + f_c + m_c)

F1 is the mean over the classes that anybody met or predicted (scikit-learn's `macro`); for tags it
is that of all entities together (seqeval's `micro`). Both halves stand here. All agents must come
to the same bits, so the opening half adds with `math.fsum` and else only multiplies and divides.

Precision: a share is rounded, without bias, to one of h steps (crypto/README.md: h half levels), so
a mean of K updates is off by less than K * weight_cap / (sum of weights * h), before the division
by p. With 16 bits at K = 100 and equal weights that is 2.4e-5; zero stays zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum, IntEnum
from typing import Self

from fedloom.errors import Reason, Refused
from fedloom.tasks import (
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
)
from fedloom.v1 import control_pb2

_LEAST_BOUND = 4.0  # nats, or the square of a standardised value's unit
_BOUND_PER_BIT = 1.5  # a bit of classes is 0.69 nats: about twice a guess's loss
MAX_BOUND = 1e9


class Report(IntEnum):
    """What agents say of quality, on held-out rows and in training."""

    MEAN = 1  # within their updates: whoever can open the sum learns the mean
    EACH = 2  # each to the coordinator, in clear
    NONE = 3


class Metric(Enum):
    """A number that quality is told by; its value names it in run files and answers."""

    LOSS = "loss"
    ACCURACY = "accuracy"
    MACRO_F1 = "macro_f1"
    ENTITY_F1 = "entity_f1"
    MEAN_SQUARED_ERROR = "mean_squared_error"
    PERPLEXITY = "perplexity"

    @property
    def rises(self) -> bool:
        """Whether more is better."""
        return self in (Metric.ACCURACY, Metric.MACRO_F1, Metric.ENTITY_F1)


@dataclass(frozen=True)
class EvaluationTerms:
    """How a run's agents report quality; what each value is, control.proto says."""

    report: Report = Report.MEAN
    tell: bool = True
    loss_bound: float = 0.0  # 0: follows from the task

    def __post_init__(self) -> None:
        if not 0 <= self.loss_bound <= MAX_BOUND:  # NaN neither
            raise Refused(
                Reason.MALFORMED,
                f"expected loss_bound in 0..{MAX_BOUND:g}, found {self.loss_bound}",
            )

    @classmethod
    def from_message(cls, message: control_pb2.EvaluationTerms) -> Self:
        """Validate what a peer sent."""
        try:
            report = Report(message.report)
        except ValueError:
            raise Refused(
                Reason.MALFORMED, f"expected a QualityReport, found {message.report}"
            ) from None
        return cls(report, message.tell, message.loss_bound)

    def to_message(self) -> control_pb2.EvaluationTerms:
        """Return the form that travels."""
        return control_pb2.EvaluationTerms(
            report=control_pb2.QualityReport.ValueType(self.report),
            tell=self.tell,
            loss_bound=self.loss_bound,
        )


DEFAULT_EVALUATION = EvaluationTerms()


@dataclass(frozen=True)
class Counts:
    """Predictions by class: those that are right, those that are false, and those missed."""

    right: tuple[int, ...] = ()
    false: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Quality on one device's held-out data; `count` labels, of which `correct` were predicted.

    `counts` are of the classes that F1 is made of, and empty for a task without.
    """

    count: int
    correct: int
    mean_loss: float
    counts: Counts = Counts()
    mean_squared_error: float = 0.0


@dataclass(frozen=True)
class Quality:
    """A model's quality, or a mean of qualities; None is what nobody measured or nobody can.

    `share` is that of the updates' weight which came from devices with held-out rows.
    """

    share: float = 0.0
    training_loss: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    f1: float | None = None
    mean_squared_error: float | None = None

    def value(self, metric: Metric) -> float | None:
        """Return what the metric says, of whatever task it is."""
        match metric:
            case Metric.LOSS:
                return self.loss
            case Metric.PERPLEXITY:
                return None if self.loss is None else _exp(self.loss)
            case Metric.ACCURACY:
                return self.accuracy
            case Metric.MACRO_F1 | Metric.ENTITY_F1:
                return self.f1
            case Metric.MEAN_SQUARED_ERROR:
                return self.mean_squared_error

    @classmethod
    def from_message(cls, message: control_pb2.MeanQuality) -> Self:
        """Validate what a peer sent; raises Refused(MALFORMED)."""
        found = cls(
            message.share,
            message.training_loss if message.HasField("training_loss") else None,
            message.loss if message.HasField("loss") else None,
            message.accuracy if message.HasField("accuracy") else None,
            message.f1 if message.HasField("f1") else None,
            message.mean_squared_error if message.HasField("mean_squared_error") else None,
        )
        shares = (found.share, found.accuracy, found.f1)
        losses = (found.training_loss, found.loss, found.mean_squared_error)
        if not all(
            value is None or 0 <= value <= most
            for values, most in ((shares, 1.0), (losses, MAX_BOUND))
            for value in values
        ):
            raise Refused(
                Reason.MALFORMED, f"expected shares in 0..1 and losses in 0..{MAX_BOUND:g}"
            )
        return found

    def to_message(self) -> control_pb2.MeanQuality:
        """Return the form that travels."""
        return control_pb2.MeanQuality(
            **{field.name: getattr(self, field.name) for field in fields(self)}
        )


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """Return what a task's models are measured by, the first for a table with little room."""
    match task:
        case ArrayLearning() if task.values:
            return Metric.MEAN_SQUARED_ERROR, Metric.LOSS
        case TextClassification() | ArrayLearning():
            return Metric.ACCURACY, Metric.MACRO_F1, Metric.LOSS
        case TokenClassification():
            return Metric.ENTITY_F1, Metric.ACCURACY, Metric.LOSS
        case CausalLanguageModelling():
            return Metric.PERPLEXITY, Metric.ACCURACY, Metric.LOSS


def named(quality: Quality, task: Task) -> dict[str, float]:
    """Return what there is of the task's metrics, by name."""
    found = {metric.value: quality.value(metric) for metric in metrics_of(task)}
    return {name: value for name, value in found.items() if value is not None}


def local_quality(evaluation: Evaluation, task: Task) -> Quality:
    """Return one device's quality, as it is: nothing is cut or rounded."""
    error = evaluation.mean_squared_error if _learns_values(task) else None
    accuracy = None if _learns_values(task) else evaluation.correct / evaluation.count
    counts = evaluation.counts
    f1 = _f1(counts.right, counts.false, counts.missed) if _classes(task) else None
    return Quality(1.0, None, evaluation.mean_loss, accuracy, f1, error)


def tail_length(terms: EvaluationTerms, task: Task) -> int:
    """Return M, how many values follow what the strategy sends."""
    return 4 + 3 * _classes(task) if terms.report is Report.MEAN else 0


def tail_shares(
    terms: EvaluationTerms, task: Task, training_loss: float, evaluation: Evaluation | None
) -> list[float]:
    """Return one device's tail, (M,) in 0..1, before the clip scales it."""
    if terms.report is not Report.MEAN:
        return []
    bound = loss_bound(terms, task)
    trained = _share(training_loss, bound)
    if evaluation is None:
        return [trained] + [0.0] * (tail_length(terms, task) - 1)
    rows, counts = evaluation.count, evaluation.counts
    if _learns_values(task):
        second = _share(evaluation.mean_squared_error, bound)
    else:
        second = evaluation.correct / rows
    by_class = (*counts.right, *counts.false, *counts.missed)
    return [
        trained,
        1.0,
        _share(evaluation.mean_loss, bound),
        second,
        *(_share(count, rows) for count in by_class),
    ]


def mean_quality(
    terms: EvaluationTerms, task: Task, opened: Sequence[float], clip: float
) -> Quality | None:
    """Return what an opened tail says, (M,) as it came with `clip`; None where there is none."""
    if not opened:
        return None
    bound = loss_bound(terms, task)
    # Rounding may leave a share a little outside 0..1.
    shares = [min(max(value / clip, 0.0), 1.0) for value in opened]
    trained, share = shares[0] * bound, shares[1]
    if share == 0.0:
        return Quality(training_loss=trained)
    loss, second, *by_class = (min(value / share, 1.0) for value in shares[2:])
    classes = _classes(task)
    right, false, missed = (by_class[i * classes : (i + 1) * classes] for i in range(3))
    f1 = _f1(right, false, missed) if classes else None
    if _learns_values(task):
        return Quality(share, trained, loss * bound, None, f1, second * bound)
    return Quality(share, trained, loss * bound, second, f1)


def loss_bound(terms: EvaluationTerms, task: Task) -> float:
    """Return what a loss or error is cut at: stated, or far above that of a guess.

    From the classes' number of bits and not its logarithm, whose last bit depends on the machine.
    """
    if terms.loss_bound:
        return terms.loss_bound
    if isinstance(task, CausalLanguageModelling):
        classes = task.vocabulary_size
    else:
        classes = len(task.labels)
    return max(_LEAST_BOUND, _BOUND_PER_BIT * classes.bit_length())


def _classes(task: Task) -> int:
    """Return how many classes F1 is made of; 0: there is none."""
    match task:
        case TextClassification() | ArrayLearning():
            return len(task.labels)
        case TokenClassification():
            return 1
        case CausalLanguageModelling():
            return 0


def _learns_values(task: Task) -> bool:
    return isinstance(task, ArrayLearning) and bool(task.values)


def _share(value: float, whole: float) -> float:
    return min(max(value / whole, 0.0), 1.0)


def _f1(right: Sequence[float], false: Sequence[float], missed: Sequence[float]) -> float:
    """Return the mean of the classes' F1; 0 where no class was met or predicted."""
    found = []
    for r, f, m in zip(right, false, missed, strict=True):
        met = math.fsum((2 * r, f, m))
        if met > 0:
            found.append(min(2 * r / met, 1.0))
    return math.fsum(found) / len(found) if found else 0.0


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
