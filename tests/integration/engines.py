"""Engines that do not train: their updates are drawn, slow, late or wrong, as a test asks."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.engine import Evaluation, LocalUpdate, Progress
from fedloom.adapters import Theta
from fedloom.errors import Refused
from fedloom.quality import Counts
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining

LARGEST_VALUE = 2.0**-6  # of an update; below every clip that the runs of these tests imply
GATE_SECONDS = 60
_STEPS = 1 << 9  # values are multiples of 2^-15: their weighted sums are exact in float64


@dataclass(frozen=True)
class Trained:
    """One round of an engine: from which state, with what result."""

    theta: Theta
    update: LocalUpdate
    linear: Theta | None = None  # what it was told to add to every gradient


def two_classes(count: int, correct: int, mean_loss: float) -> Evaluation:
    """Return a quality of two labels: what is not right was taken for the first."""
    wrong = count - correct
    return Evaluation(count, correct, mean_loss, Counts((correct, 0), (wrong, 0), (0, wrong)))


class Gate:
    """Holds a function of the product in its thread."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def wait(self) -> None:
        """Announce the thread and hold it."""
        self.entered.set()
        assert self.open.wait(GATE_SECONDS), "nobody opened the gate"


class FakeEngine:
    """An `edge_agent.engine.Engine` whose update follows from the round's order seed alone."""

    def __init__(self, samples: int, spoil: Callable[[LocalUpdate], LocalUpdate] | None = None):
        self.samples = samples
        self.history: list[Trained] = []
        self.training = threading.Event()  # set as soon as a training begins
        self.may_finish = threading.Event()  # trainings wait for it
        self.may_finish.set()
        self.begun = 0
        self.pauses_at = 0  # number of the training that clears `may_finish`, from 1
        self.refusal: Refused | None = None  # raised instead of training
        self.evaluation_gate: Gate | None = None  # holds evaluations until it is open
        self.evaluation: Evaluation | None = two_classes(count=10, correct=7, mean_loss=0.5)
        self.shrinks = False  # half of the model goes, whatever is drawn
        self.seconds = 0.0  # that a training takes, and an evaluation
        self._spoil = spoil or (lambda update: update)

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
        """Draw an update; while `may_finish` is clear, behave like a training that goes on."""
        self.begun += 1
        if self.begun == self.pauses_at:
            self.may_finish.clear()
        self.training.set()
        if self.refusal is not None:
            raise self.refusal
        progress(0.5)
        time.sleep(self.seconds)
        while not self.may_finish.wait(0.01):
            progress(0.5)
        levels = np.random.default_rng(order_seed).integers(-_STEPS, _STEPS + 1, len(theta))
        delta = levels.astype(np.float32) * np.float32(LARGEST_VALUE / _STEPS)
        if self.shrinks:
            delta = theta * np.float32(-0.5)
        update = self._spoil(LocalUpdate(delta, self.samples, mean_loss=0.25))
        self.history.append(Trained(theta.copy(), update, linear))
        return replace(update, delta=update.delta.copy())  # which its taker uses up

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """Return the prepared quality."""
        time.sleep(self.seconds)
        if self.evaluation_gate is not None:
            self.evaluation_gate.wait()
        return self.evaluation

    def update_from(self, theta: Theta) -> LocalUpdate:
        """Return what was trained last from exactly this state."""
        for trained in reversed(self.history):
            if np.array_equal(trained.theta, theta):
                return trained.update
        raise AssertionError(f"never trained from this state, in {len(self.history)} rounds")


class KeepingEngine(FakeEngine):
    """Makes steps and keeps them as engines do that train; it stops halfway as a test asks."""

    steps = 4

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.steps_made = 0  # by all trainings together

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
        """Go on from the kept state, wait halfway while `may_finish` is clear, draw an update."""
        subject = order_seed.to_bytes(32, "little")
        state = checkpoint.load(TrainingState(subject, self.steps, (theta.copy(),)))
        while not state.finished:
            state.step += 1
            state.weight_sum += 1.0
            self.steps_made += 1
            checkpoint.save(state)
            if state.step == self.steps // 2:
                self.training.set()
                try:
                    while not self.may_finish.wait(0.01):
                        progress(0.5)
                finally:
                    checkpoint.save(state)  # one was under way when the end came
            progress(state.step / self.steps)
        return super().train(theta, terms, order_seed, progress, checkpoint, linear, parts)
