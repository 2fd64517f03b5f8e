"""Virtual clients of a plan: an agent's engine moves them all, over one session of the graph."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from edge_agent.batches import Examples
from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.data import DataSource
from edge_agent.engine import Evaluation, LocalUpdate
from edge_agent.local_training import Step
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.strategies.parts import Parts
from fedloom.terms import LocalTraining
from simulation.clients import Clients
from simulation.movers import Journey


class PlanMover:
    """See Mover. `clients` hold examples of the plan's task; sessions are loaded at first use."""

    group = 1

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        clients: Clients,
        held_out: Examples | None = None,
        threads: int = 1,
    ) -> None:
        self.layout = plan.layout
        self._clients = clients
        self._engine = _VirtualEngine(folder, plan, held_out, threads)

    def move(
        self, journeys: Sequence[Journey], terms: LocalTraining, parts: Parts | None
    ) -> list[LocalUpdate | Refused]:
        """See Mover."""
        return [self._moved(journey, terms, parts) for journey in journeys]

    def _moved(
        self, journey: Journey, terms: LocalTraining, parts: Parts | None
    ) -> LocalUpdate | Refused:
        self._engine.hold(self._clients[journey.client])
        seed, checkpoint = journey.order_seed, _Unkept()
        try:
            update = self._engine.train(
                journey.start, terms, seed, lambda share: None, checkpoint, journey.linear, parts
            )
        except Refused as refused:
            if refused.reason is not Reason.TRAINING_FAILED:
                raise
            return refused
        if not math.isfinite(update.mean_loss):
            found = f"expected a finite loss, found {update.mean_loss}"
            return Refused(Reason.TRAINING_FAILED, found)
        return update

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """See Mover."""
        return self._engine.evaluate(theta)


class _VirtualEngine(OnnxEngine):
    """An agent's engine with one client's data after another's, none of which it reads."""

    def __init__(self, folder: Path, plan: Plan, held_out: Examples | None, threads: int) -> None:
        super().__init__(folder, plan, DataSource(folder), None, threads)
        self._held_out_samples = held_out

    def hold(self, samples: Examples) -> None:
        """Train on these from now on."""
        self._training_samples = samples

    @functools.cached_property
    def _kept_step(self) -> Step:
        return super()._training_step()

    def _training_step(self) -> Step:
        return self._kept_step


class _Unkept(Checkpoint):
    """Nothing outlives a virtual client's training: a round that is cut is conducted again."""

    def __init__(self) -> None:
        super().__init__(Path(), bytes(16), 1)

    def load(self, fresh: TrainingState) -> TrainingState:
        """Begin."""
        return fresh

    def save(self, state: TrainingState) -> None:
        """Forget."""
