"""Train and evaluate a plan with ONNX Runtime and numpy: the engine of devices without torch.

The graph gives sums over a micro-batch, so adding them over a batch is exact; everything after the
gradient (the strategy's terms, the optimiser) happens in `local_rules`, on flat vectors.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edge_agent.batches import Examples, Indices, feeds, micro_batches, training_batches
from edge_agent.checkpoints import Checkpoint, TrainingState, training_subject
from edge_agent.data import DataSource
from edge_agent.engine import Evaluation, LocalUpdate, Progress
from edge_agent.examples import read_examples, read_held_out
from edge_agent.graphs import GraphSession, inference_batches
from edge_agent.local_rules import LocalSteps
from edge_agent.optimisers import Gradient
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import GraphContract, eval_contract, train_contract
from fedloom.plans import Plan
from fedloom.tasks import Task
from fedloom.terms import LocalTraining, steps_of

# Padded tokens in one run of the training graph, which keeps every activation. With MiniLM and
# texts of up to 64 tokens, 256 against 1024: peak 198 MB instead of 302 MB, and 15 % less CPU time.
_MAX_TRAINING_TOKENS = 256
_SUMS = ("loss_sum", "weight_sum", "grad_sum")
_EVAL_SUMS = ("loss_sum", "weight_sum", "correct")


class OnnxEngine:
    """An Engine; reads and tokenises the data once, at its first use, and keeps the token ids.

    `threads` 0 leaves the number to ONNX Runtime (one for each physical core). `micro_batch` is the
    most rows that go through the graph at once; it bounds memory and never changes the result
    beyond rounding. Equal updates to the last bit need the same number of threads. The caller has
    compared the plan's members with their hashes.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        train_data: DataSource,
        held_out: DataSource | None,
        threads: int = 0,
        micro_batch: int = 16,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._train_data = train_data
        self._held_out = held_out
        self._threads = threads
        self._micro_batch = micro_batch
        self.broken_rows = 0  # in both files, as far as they have been read

    @np.errstate(over="ignore", invalid="ignore")  # divergence is found below and refused
    def train(
        self,
        theta: Theta,
        terms: LocalTraining,
        order_seed: int,
        progress: Progress,
        checkpoint: Checkpoint,
        linear: Theta | None = None,
    ) -> LocalUpdate:
        """See Engine."""
        samples = self._training_samples
        steps = steps_of(terms, len(samples))
        local = LocalSteps(theta, terms, steps, linear)
        state = checkpoint.load(
            TrainingState(
                training_subject(theta, terms, order_seed, samples.sha256, linear),
                steps,
                (theta.astype(np.float32), *local.vectors),  # a copy of theta, moved in place
            )
        )
        if state.step:
            progress(state.step / steps)
        for _ in self._steps(state, terms, order_seed, local):
            checkpoint.save(state)
            progress(state.step / steps)
        delta = np.subtract(state.trained, theta, out=state.trained)
        _require_learned(steps, delta)
        return LocalUpdate(delta, len(samples), state.loss_sum / state.weight_sum)

    def _steps(
        self,
        state: TrainingState,
        terms: LocalTraining,
        order_seed: int,
        local: LocalSteps,
    ) -> Iterator[None]:
        """Move the state by a step each time, up to the training's end."""
        if state.finished:
            return
        # Dropped with its memory after the round: with MiniLM that gives back 100-200 MB, and
        # loading again takes 0.15 s. An agent waits for longer than it trains.
        session = self._session(train_contract, Reason.TRAINING_FAILED)
        samples = self._training_samples
        trained, *vectors = state.vectors
        local.restore(state.step, tuple(vectors))
        epochs = math.ceil(state.steps / math.ceil(len(samples) / terms.batch_size))
        batches = training_batches(
            samples.lengths, terms.batch_size, epochs, order_seed, state.step
        )
        for rows in itertools.islice(batches, state.steps - state.step):
            loss, weight, gradient = self._sums(session, trained, samples, rows)
            _require_finite(state.step + 1, loss, weight, gradient)
            gradient /= np.float32(weight)
            local.step(trained, gradient)
            state.step += 1
            state.loss_sum += loss
            state.weight_sum += weight
            yield

    @np.errstate(over="ignore", invalid="ignore")
    def evaluate(self, theta: Theta) -> Evaluation | None:
        """See Engine."""
        samples = self._held_out_samples
        if samples is None:
            return None
        session = self._session(eval_contract, Reason.PLAN_UNSUPPORTED)
        sums = np.zeros(3)
        for rows in inference_batches(samples):
            sums += session.run(_EVAL_SUMS, {"theta": theta, **feeds(samples, rows)})
        loss, weight, correct = sums.tolist()
        if not (math.isfinite(loss) and weight > 0):
            raise Refused(
                Reason.TRAINING_FAILED,
                f"expected a finite loss on held-out data, found {loss} over {weight:.0f} labels",
            )
        return Evaluation(round(weight), round(correct), loss / weight)

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

    def _session(
        self, contract: Callable[[Task, int], GraphContract], failure: Reason
    ) -> GraphSession:
        graph = contract(self._plan.task, self._plan.parameter_count)
        return GraphSession(self._folder, graph, self._threads, failure)

    def _sums(
        self, session: GraphSession, theta: Theta, samples: Examples, rows: Indices
    ) -> tuple[float, float, Gradient]:
        """Return (loss, weight, gradient) summed over a batch."""
        loss = weight = 0.0
        gradient = np.zeros(self._plan.parameter_count, np.float32)
        for part in micro_batches(rows, samples.lengths, self._micro_batch, _MAX_TRAINING_TOKENS):
            part_loss, part_weight, part_gradient = session.run(
                _SUMS, {"theta": theta, **feeds(samples, part)}
            )
            loss += float(part_loss)
            weight += float(part_weight)
            gradient += part_gradient
        return loss, weight, gradient


def _require_finite(step: int, loss: float, weight: float, gradient: Gradient) -> None:
    if math.isfinite(loss) and weight > 0 and np.isfinite(gradient).all():
        return
    bad = len(gradient) - int(np.isfinite(gradient).sum())
    raise Refused(
        Reason.TRAINING_FAILED,
        f"expected a finite loss and gradient at step {step}, found loss {loss} over weight "
        f"{weight} and {bad} of {len(gradient)} gradient values not finite",
    )


def _require_learned(steps: int, delta: Theta) -> None:
    bad = len(delta) - int(np.isfinite(delta).sum())
    if bad or not delta.any():
        found = f"{bad} values not finite" if bad else "no value changed"
        raise Refused(
            Reason.TRAINING_FAILED, f"expected a finite update after {steps} steps, found {found}"
        )
