"""Virtual clients of a plan: one graph session serves them all, and moves each as an agent would.

The steps are those of `edge_agent.onnx_engine`; a test holds the two equal to the last bit.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_agent.batches import Examples, feeds, micro_batches, training_batches
from edge_agent.engine import Evaluation, LocalUpdate
from edge_agent.graphs import GraphSession
from edge_agent.local_rules import LocalSteps
from edge_agent.optimisers import Vector
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import eval_contract, train_contract
from fedloom.plans import Plan
from fedloom.terms import LocalTraining, steps_of
from simulation.clients import Clients
from simulation.movers import Task, checked

_MICRO_BATCH, _MICRO_BATCH_TOKENS = 16, 256  # an agent's defaults: other cuts round differently
_EVALUATION_ROWS, _EVALUATION_TOKENS = 64, 512


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
        self._folder = folder
        self._plan = plan
        self._clients = clients
        self._held_out = held_out
        self._threads = threads

    @functools.cached_property
    def _session(self) -> GraphSession:
        graph = train_contract(self._plan.task, self._plan.parameter_count)
        return GraphSession(self._folder, graph, self._threads, Reason.TRAINING_FAILED)

    def move(
        self,
        tasks: Sequence[Task],
        theta: Theta,
        terms: LocalTraining,
        linear: Sequence[Vector | None],
    ) -> list[LocalUpdate | Refused]:
        """See Mover."""
        pairs = zip(tasks, linear, strict=True)
        return [self._moved(task, theta, terms, own) for task, own in pairs]

    @np.errstate(over="ignore", invalid="ignore")  # divergence is found and refused
    def _moved(
        self, task: Task, theta: Theta, terms: LocalTraining, linear: Vector | None
    ) -> LocalUpdate | Refused:
        held = self._clients[task.client]
        lengths, steps = held.lengths, steps_of(terms, len(held))
        local, trained = LocalSteps(theta, terms, steps, linear), theta.copy()
        epochs = math.ceil(steps / math.ceil(len(held) / terms.batch_size))
        batches = training_batches(lengths, terms.batch_size, epochs, task.order_seed, 0)
        loss_sum = weight_sum = 0.0
        for rows in itertools.islice(batches, steps):
            loss = weight = 0.0
            gradient = np.zeros(len(theta), np.float32)
            for part in micro_batches(rows, lengths, _MICRO_BATCH, _MICRO_BATCH_TOKENS):
                sums = self._session.run(
                    ("loss_sum", "weight_sum", "grad_sum"),
                    {"theta": trained, **feeds(held, part)},
                )
                loss += float(sums[0])
                weight += float(sums[1])
                gradient += sums[2]
            if not (math.isfinite(loss) and weight > 0):
                return checked(trained, len(held), math.nan)
            gradient /= np.float32(weight)
            local.step(trained, gradient)
            loss_sum += loss
            weight_sum += weight
        return checked(np.subtract(trained, theta, out=trained), len(held), loss_sum / weight_sum)

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """See Mover."""
        held = self._held_out
        if held is None:
            return None
        graph = eval_contract(self._plan.task, self._plan.parameter_count)
        session = GraphSession(self._folder, graph, self._threads, Reason.PLAN_UNSUPPORTED)
        sums, every = np.zeros(3), np.arange(len(held))
        for rows in micro_batches(every, held.lengths, _EVALUATION_ROWS, _EVALUATION_TOKENS):
            found = session.run(
                ("loss_sum", "weight_sum", "correct"), {"theta": theta, **feeds(held, rows)}
            )
            sums += found
        loss, weight, correct = sums.tolist()
        return Evaluation(round(weight), round(correct), loss / weight)
