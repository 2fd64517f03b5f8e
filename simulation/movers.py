"""What trains virtual clients, several in turn or at once, and what comes of it.

A mover moves models; around it every client's round is what an agent's is: the strategy's linear
term and the parts that are its own before, the strategy's update vector and what it keeps after
(`edge_agent.local_rules`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_agent.engine import Evaluation, LocalUpdate
from edge_agent.local_rules import outgoing, strategys
from edge_agent.optimisers import Vector
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.strategies import Layout, Memory, ServerState, algorithm
from fedloom.strategies.ditto import personal_terms, pull
from fedloom.strategies.parts import Parts
from fedloom.strategies.portions import (
    keeps_own_model,
    parts_of,
    sends_everything,
    start_of,
)
from fedloom.terms import LocalTraining, Personal


@dataclass(frozen=True)
class Task:
    """One client's training in a round: who, in which order of its data, with which memory."""

    client: str
    order_seed: int
    memory: Memory = ()


@dataclass(frozen=True)
class Journey:
    """A client's training from `start` (P,), which is not written to; `linear` as for an Engine."""

    client: str
    order_seed: int
    start: Theta
    linear: Vector | None = None


@dataclass(frozen=True)
class Trained:
    """What a client gives: `values` (U,) that count for `weight`, and what it shall remember."""

    values: Vector
    weight: int
    memory: Memory
    samples: int
    mean_loss: float


Outcome = Trained | Refused


class Mover(Protocol):
    """Trains clients from a model, one after another or several at once.

    A client's movement depends on the journeys of its call and on nothing that was called before.
    """

    @property
    def layout(self) -> Layout:
        """Where the model's tensors lie in theta, and what they are."""
        ...

    @property
    def group(self) -> int:
        """How many clients a call shall have."""
        ...

    def move(
        self, journeys: Sequence[Journey], terms: LocalTraining, parts: Parts | None
    ) -> list[LocalUpdate | Refused]:
        """Return each client's movement; without `parts` all of theta is trained and sent."""
        ...

    def evaluate(self, theta: Theta) -> Evaluation | None:
        """Return the quality on what is held out; None when nothing is."""
        ...


def train(
    mover: Mover, tasks: Sequence[Task], state: ServerState, terms: LocalTraining
) -> list[Outcome]:
    """Train these clients from the server's state, under the round's terms."""
    layout = mover.layout
    rule, whole = algorithm(terms, layout), sends_everything(terms, layout)
    parts = None if whole else parts_of(terms, layout, state.rounds)
    journeys = [
        Journey(
            task.client,
            task.order_seed,
            state.theta if whole else start_of(terms, layout, state.theta, task.memory),
            rule.linear(state, strategys(terms, task.memory)),
        )
        for task in tasks
    ]
    moved = mover.move(journeys, terms, parts)
    own: Sequence[Theta | Refused | None] = [None] * len(tasks)
    if keeps_own_model(terms):
        if terms.personal is Personal.DITTO:
            own = _beside(mover, tasks, state.theta, terms, parts)
        else:
            own = [_after(*pair) for pair in zip(journeys, moved, strict=True)]
    return [
        _sent(task, update, kept, state, terms, layout)
        for task, update, kept in zip(tasks, moved, own, strict=True)
    ]


def _after(journey: Journey, moved: LocalUpdate | Refused) -> Theta | Refused:
    if isinstance(moved, Refused):
        return moved
    own: Theta = journey.start + moved.delta
    return own


def _beside(
    mover: Mover,
    tasks: Sequence[Task],
    theta: Theta,
    terms: LocalTraining,
    parts: Parts | None,
) -> list[Theta | Refused]:
    """Return each client's own model after its training, which is beside that of the update."""
    journeys = []
    for task in tasks:
        own = task.memory[-1]
        drawn = pull(own, theta, terms.personal_lambda)
        journeys.append(Journey(task.client, task.order_seed, own, drawn))
    moved = mover.move(journeys, personal_terms(terms), parts)
    return [_after(*pair) for pair in zip(journeys, moved, strict=True)]


def _sent(
    task: Task,
    update: LocalUpdate | Refused,
    own: Theta | Refused | None,
    state: ServerState,
    terms: LocalTraining,
    layout: Layout,
) -> Outcome:
    if isinstance(update, Refused):
        return update
    if isinstance(own, Refused):
        return own
    sent = outgoing(terms, state, task.memory, update, layout, own)
    return Trained(sent.values, sent.weight, sent.memory, update.samples, update.mean_loss)


def checked(delta: Theta, samples: int, mean_loss: float) -> LocalUpdate | Refused:
    """Refuse what no agent would send: a training that diverged, or that changed nothing."""
    if not math.isfinite(mean_loss) or not np.isfinite(delta).all():
        found = "values that are not finite"
    elif not delta.any():
        found = "no value changed"
    else:
        return LocalUpdate(delta, samples, float(mean_loss))
    return Refused(Reason.TRAINING_FAILED, f"expected a finite update, found {found}")


class Crew(Protocol):
    """Who trains: this process, several, or several machines. The results are the same."""

    @property
    def group(self) -> int:
        """How many tasks a group shall have."""
        ...

    def begin(self, state: ServerState, terms: LocalTraining) -> None:
        """Tell everyone what the round's clients start from."""
        ...

    def trained(self, groups: Iterator[Sequence[Task]]) -> Iterator[list[Outcome]]:
        """Yield what comes of each group, in the order of the groups.

        A group's values are valid until the next one is asked for. Few groups are under way at a
        time, however many there are.
        """
        ...

    def close(self) -> None:
        """End."""
        ...


class Alone:
    """See Crew: this process."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._round: tuple[ServerState, LocalTraining] | None = None

    @property
    def group(self) -> int:
        """See Crew."""
        return self._mover.group

    def begin(self, state: ServerState, terms: LocalTraining) -> None:
        """See Crew."""
        self._round = (state, terms)

    def trained(self, groups: Iterator[Sequence[Task]]) -> Iterator[list[Outcome]]:
        """See Crew."""
        assert self._round is not None  # noqa: S101 - the caller begins first
        for tasks in groups:
            yield train(self._mover, tasks, *self._round)

    def close(self) -> None:
        """See Crew."""
