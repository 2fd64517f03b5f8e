"""What the session needs from whatever executes a plan on this device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge_agent.checkpoints import Checkpoint
from fedloom.adapters import Theta
from fedloom.quality import Evaluation
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining

__all__ = ["Engine", "Evaluation", "LocalUpdate", "Progress"]

Progress = Callable[[float], None]  # share done, 0..1; may raise to interrupt the training


@dataclass(frozen=True)
class LocalUpdate:
    """What a round of local training gives: `delta` (P,) float32 is trained minus global theta."""

    delta: Theta
    samples: int
    mean_loss: float  # over the round, nats per sample
    label_counts: tuple[int, ...] = ()  # samples of each label; only where the strategy sends them


class Engine(Protocol):
    """Executes one plan over this device's data. Methods block; the session calls them in threads.

    They raise Refused with a Reason for the coordinator: DATA_*, PLAN_*, TRAINING_FAILED.
    """

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
        """Train from `theta` (unchanged) for one round; `order_seed` fixes the data's order.

        Make `fedloom.terms.steps_of` steps, each as `edge_agent.local_rules.LocalSteps` makes it
        from the mean gradient of a batch; `linear` (P,) is what the strategy adds to every one,
        `parts` are those that the round trains; None: all of theta.
        Begin with the state that `checkpoint` loads and hand it every step's: the update is the
        same to the last bit, wherever a process before this one was killed.
        """
        ...

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """Evaluate on held-out data, with what `edge_agent.metrics` counts; None without any."""
        ...
