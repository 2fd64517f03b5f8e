"""Train and evaluate a plan on this device's data, whatever computes the sums.

A graph gives sums over a micro-batch, so adding them over a batch is exact; everything after the
gradient (the strategy's terms, the optimiser) happens in `local_rules`, on flat vectors. An engine
is a LocalEngine that loads steps.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.batches import (
    Examples,
    Feeds,
    Indices,
    feeds,
    inference_batches,
    micro_batches,
    training_batches,
)
from edge_agent.checkpoints import Checkpoint, TrainingState, training_subject
from edge_agent.data import DataSource
from edge_agent.engine import Evaluation, LocalUpdate, Progress
from edge_agent.examples import read_examples, read_held_out
from edge_agent.local_rules import LocalSteps
from edge_agent.metrics import Tally
from edge_agent.optimisers import Gradient
from edge_agent.prefetching import prefetched
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.strategies.parts import Parts
from fedloom.tasks import ArrayLearning, Task
from fedloom.terms import LocalTraining, steps_of

_T = TypeVar("_T")


class Step(Protocol):
    """A loaded computation over micro-batches; dropping the object gives its memory back."""

    @property
    def ahead(self) -> bool:
        """Whether `place` shall work in a thread of its own while `sums` does."""
        ...

    def place(self, feeds: Feeds) -> Any:
        """Return a micro-batch where `sums` reads it."""
        ...

    def sums(self, theta: Theta, placed: Any) -> Sequence[NDArray[Any]]:
        """Return loss_sum, weight_sum and grad_sum (T,) float32.

        To evaluate: what `edge_agent.metrics.evaluation_outputs` names.

        Raises Refused when the computation fails; values that are not finite are the caller's.
        """
        ...


class LocalEngine(ABC):
    """An Engine; reads and tokenises the data once, at its first use, and keeps the token ids.

    `micro_batch` and `micro_batch_tokens` are the most rows and padded tokens that go through a
    training step at once; they bound memory and never change the result beyond rounding. The caller
    has compared the plan's members with their hashes.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        train_data: DataSource,
        held_out: DataSource | None,
        micro_batch: int,
        micro_batch_tokens: int,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._train_data = train_data
        self._held_out = held_out
        self._micro_batch = micro_batch
        self._micro_batch_tokens = micro_batch_tokens
        self.broken_rows = 0  # in both files, as far as they have been read

    @abstractmethod
    def _training_step(self) -> Step:
        """Load what trains; Refused(PLAN_UNSUPPORTED) when it cannot be or breaks its contract."""

    @abstractmethod
    def _evaluation_step(self) -> Step:
        """Load what evaluates; refuses as `_training_step`."""

    @np.errstate(over="ignore", invalid="ignore")  # divergence is found below and refused
    def train(
        self,
        theta: Theta,
        terms: LocalTraining,
        order_seed: int,
        progress: Progress,
        checkpoint: Checkpoint,
        linear: Theta | None = None,
        parts: Parts | None = None,
    ) -> LocalUpdate:
        """See Engine."""
        samples = self._training_samples
        steps = steps_of(terms, len(samples))
        count = self._plan.trained_count  # T: residuals, behind it, have no gradient
        start = theta[:count]
        added = None if linear is None else linear[:count]
        local = LocalSteps(start, terms, steps, added, parts)
        state = checkpoint.load(
            TrainingState(
                training_subject(theta, terms, order_seed, samples.sha256, linear, parts),
                steps,
                (start.astype(np.float32), *local.vectors),  # a copy of theta, moved in place
            )
        )
        if state.step:
            progress(state.step / steps)
        with closing(self._steps(state, terms, order_seed, local, theta[count:])) as moves:
            for _ in moves:
                checkpoint.save(state)
                progress(state.step / steps)
        delta = np.subtract(state.trained, start, out=state.trained)
        _require_learned(steps, delta)
        counts = label_counts(self._plan.task, samples) if terms.sends_labels else ()
        moved = _followed_by(delta, np.zeros(len(theta) - count, np.float32))
        return LocalUpdate(moved, len(samples), state.loss_sum / state.weight_sum, counts)

    def _steps(
        self,
        state: TrainingState,
        terms: LocalTraining,
        order_seed: int,
        local: LocalSteps,
        residuals: Theta,
    ) -> Generator[None, None, None]:
        """Move the state by a step each time, up to the training's end."""
        if state.finished:
            return
        samples = self._training_samples
        values, *vectors = state.vectors
        whole = _followed_by(values, residuals)  # (P,)
        trained = whole[: len(values)]
        state.vectors = (trained, *vectors)
        local.restore(state.step, tuple(vectors))
        epochs = math.ceil(state.steps / math.ceil(len(samples) / terms.batch_size))
        batches = training_batches(
            samples.lengths, terms.batch_size, epochs, order_seed, state.step
        )
        remaining = itertools.islice(batches, state.steps - state.step)
        for loss, weight, gradient in self._sums(whole, remaining):
            _require_finite(state.step + 1, loss, weight, gradient)
            gradient /= np.float32(weight)
            local.step(trained, gradient)
            state.step += 1
            state.loss_sum += loss
            state.weight_sum += weight
            yield

    def _sums(
        self, theta: Theta, batches: Iterator[Indices]
    ) -> Iterator[tuple[float, float, Gradient]]:
        """Yield (loss, weight, gradient) summed over each batch, from theta as it is by then."""
        # Loaded for a round and dropped with its memory: with MiniLM that gives back 100-200 MB,
        # and loading again takes 0.15 s. An agent waits for longer than it trains.
        step = self._training_step()
        loss = weight = 0.0
        gradient = np.zeros(self._plan.trained_count, np.float32)
        with closing(_stream(step, self._parts(batches))) as parts:
            for placed, last in parts:
                part_loss, part_weight, part_gradient = step.sums(theta, placed)
                loss += float(part_loss)
                weight += float(part_weight)
                gradient += part_gradient
                if last:
                    yield loss, weight, gradient
                    loss = weight = 0.0
                    gradient[:] = 0

    def _parts(self, batches: Iterator[Indices]) -> Iterator[tuple[Feeds, bool]]:
        """Yield the micro-batches of all batches, and whether each is its batch's last."""
        samples = self._training_samples
        for rows in batches:
            limits = self._micro_batch, self._micro_batch_tokens
            parts = list(micro_batches(rows, samples.lengths, *limits))
            for part in parts:
                yield feeds(samples, part), part is parts[-1]

    @np.errstate(over="ignore", invalid="ignore")
    def evaluate(self, theta: Theta) -> Evaluation | None:
        """See Engine."""
        samples = self._held_out_samples
        if samples is None:
            return None
        step = self._evaluation_step()
        tally = Tally(self._plan.task)
        batches = inference_batches(samples, self._micro_batch, self._micro_batch_tokens)
        fed = ((feeds(samples, rows), rows) for rows in batches)
        with closing(_stream(step, fed)) as parts:
            for placed, rows in parts:
                loss, weight, correct, *logits = step.sums(theta, placed)
                tally.add_sums(float(loss), float(weight), float(correct))
                if logits:
                    tally.add_logits(samples.labels(rows), logits[0])
        return tally.evaluation()

    @functools.cached_property
    def _training_samples(self) -> Examples:
        return self._read(self._train_data)

    @functools.cached_property
    def _held_out_samples(self) -> Examples | None:
        examples, broken = read_held_out(self._folder, self._plan, self._held_out)
        self.broken_rows += broken
        return examples

    def _read(self, source: DataSource) -> Examples:
        examples, broken = read_examples(self._folder, self._plan, source)
        self.broken_rows += broken
        return examples


def _stream(step: Step, parts: Iterator[tuple[Feeds, _T]]) -> Generator[tuple[Any, _T], None, None]:
    """Yield the micro-batches placed, with what came with each."""
    placed = ((step.place(feeds), last) for feeds, last in parts)
    return prefetched(placed) if step.ahead else placed


def _followed_by(values: Theta, residuals: Theta) -> Theta:
    """Return both, one after another; the values themselves where there is nothing behind them."""
    return np.concatenate([values, residuals]) if len(residuals) else values


def _require_finite(step: int, loss: float, weight: float, gradient: Gradient) -> None:
    if math.isfinite(loss) and weight > 0 and np.isfinite(gradient).all():
        return
    bad = len(gradient) - int(np.isfinite(gradient).sum())
    raise Refused(
        Reason.TRAINING_FAILED,
        f"expected a finite loss and gradient at step {step}, found loss {loss} over weight "
        f"{weight} and {bad} of {len(gradient)} gradient values not finite",
    )


def label_counts(task: Task, samples: Examples) -> tuple[int, ...]:
    """Return how many rows are of each label; nothing for a task without labels for its rows."""
    if not isinstance(task, ArrayLearning) or not task.labels:
        return ()
    labels = samples.labels(np.arange(len(samples)))
    return tuple(np.bincount(labels, minlength=len(task.labels)).tolist())


def _require_learned(steps: int, delta: Theta) -> None:
    bad = len(delta) - int(np.isfinite(delta).sum())
    if bad or not delta.any():
        found = f"{bad} values not finite" if bad else "no value changed"
        raise Refused(
            Reason.TRAINING_FAILED, f"expected a finite update after {steps} steps, found {found}"
        )
