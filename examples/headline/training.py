"""The three trainings that are compared, each by the product's own engine and strategies.

Agents live in this process and train one after the other. The mean of a round is formed in float64
and rounded once, which is what the protection `plain` delivers: `masked` and `encrypted` differ
from it by the rounding of updates to 16 bits, and nothing here stands for network or time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.data import DataSource
from edge_agent.local_rules import Outgoing, outgoing, strategys
from edge_agent.local_training import Step
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import Theta
from fedloom.plans import Plan
from fedloom.schedules import round_terms
from fedloom.strategies import RULES, Memory, algorithm
from fedloom.strategies.portions import (
    keeps_own_model,
    own_model,
    parts_of,
    sends_everything,
    start_of,
)
from fedloom.terms import LocalTraining

Score = Callable[[Theta], float]


class Unkept(Checkpoint):
    """Keeps nothing: what is kept of a case are its results."""

    def __init__(self) -> None:
        super().__init__(Path(), bytes(16), 1)

    def load(self, fresh: TrainingState) -> TrainingState:
        """Begin."""
        return fresh

    def save(self, state: TrainingState) -> None:
        """Forget."""


class Lasting(OnnxEngine):
    """Keeps what it has loaded, once for all engines that share `loaded`: they train in turn.

    An agent loads for each round, which would take longer here than a round of few steps.
    """

    loaded: list[Step]

    def _training_step(self) -> Step:
        if not self.loaded:
            self.loaded.append(super()._training_step())
        return self.loaded[0]


@dataclass(frozen=True)
class Trainer:
    """A plan in its folder, and where its training begins."""

    folder: Path
    plan: Plan
    theta: Theta
    loaded: list[Step] = field(default_factory=list)

    def engine(self, train: Path, held_out: Path | None = None) -> OnnxEngine:
        """Return an engine on one thread over these files."""
        test = None if held_out is None else DataSource(held_out)
        engine = Lasting(self.folder, self.plan, DataSource(train), test, threads=1)
        engine.loaded = self.loaded
        return engine


def train_alone(trainer: Trainer, rows: Path, terms: LocalTraining, seed: int) -> Theta:
    """Return theta after one device's training on its own rows."""
    engine = trainer.engine(rows)
    update = engine.train(trainer.theta, terms, seed, _ignore, Unkept())
    return np.asarray(trainer.theta + update.delta, np.float32)


def train_together(
    trainer: Trainer, agents: Sequence[Path], terms: LocalTraining, rounds: int, seed: int = 0
) -> Iterator[tuple[Theta, ...]]:
    """Yield the models in use after every round, in which all agents take part.

    It is one, or each agent's own where the terms let agents keep parts of it to themselves.
    """
    layout = trainer.plan.layout
    engines = [trainer.engine(rows) for rows in agents]
    rule = algorithm(terms, layout)
    state = rule.init(trainer.theta)
    memories = [_first_memory(terms, trainer.theta) for _ in engines]
    for number in range(rounds):
        now = round_terms(terms, number, rounds)
        parts = None if sends_everything(terms) else parts_of(terms, layout, number)
        sent = []
        for index, engine in enumerate(engines):
            memory = memories[index]
            linear = rule.linear(state, strategys(terms, memory))
            start = start_of(terms, layout, state.theta, memory)
            order = (seed * rounds + number) * len(engines) + index
            update = engine.train(start, now, order, _ignore, Unkept(), linear, parts)
            own = start + update.delta if keeps_own_model(terms) else None
            one = outgoing(now, state, memory, update, layout, own)
            memories[index] = one.memory
            sent.append(one)
        state = rule.apply(state, mean(sent), len(sent))
        if keeps_own_model(terms):
            yield tuple(own_model(terms, layout, state.theta, memory) for memory in memories)
        else:
            yield (state.theta,)


def _first_memory(terms: LocalTraining, theta: Theta) -> Memory:
    """Return what an agent remembers before its first round: zeros, and its own model."""
    zeros = tuple(np.zeros(len(theta), np.float32) for _ in RULES[terms.strategy].remembers)
    return (*zeros, theta) if keeps_own_model(terms) else zeros


def mean(sent: Sequence[Outgoing]) -> Theta:
    """Return the weighted mean of the updates, in float64 and rounded once."""
    total = sum(one.weight for one in sent)
    summed = np.zeros(len(sent[0].values))
    for one in sent:
        summed += one.weight * one.values.astype(np.float64)
    return np.asarray(summed / total, np.float32)


def _ignore(share: float) -> None:
    del share
