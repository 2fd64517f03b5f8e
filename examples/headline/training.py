"""The three trainings that are compared, each by the product's own engine and strategies.

Agents live in this process and train one after the other. The mean of a round is formed in float64
and rounded once, which is what the protection `plain` delivers: `masked` and `encrypted` differ
from it by the rounding of updates to 16 bits, and nothing here stands for network or time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.data import DataSource
from edge_agent.local_rules import Outgoing, outgoing
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import Theta
from fedloom.plans import Plan
from fedloom.schedules import round_terms
from fedloom.strategies import RULES, algorithm
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


@dataclass(frozen=True)
class Trainer:
    """A plan in its folder, and where its training begins."""

    folder: Path
    plan: Plan
    theta: Theta

    def engine(self, train: Path, held_out: Path | None = None) -> OnnxEngine:
        """Return an engine on one thread over these files."""
        test = None if held_out is None else DataSource(held_out)
        return OnnxEngine(self.folder, self.plan, DataSource(train), test, threads=1)


def train_alone(trainer: Trainer, rows: Path, terms: LocalTraining, seed: int) -> Theta:
    """Return theta after one device's training on its own rows."""
    engine = trainer.engine(rows)
    update = engine.train(trainer.theta, terms, seed, _ignore, Unkept())
    return np.asarray(trainer.theta + update.delta, np.float32)


def train_together(
    trainer: Trainer, agents: Sequence[Path], terms: LocalTraining, rounds: int
) -> Iterator[Theta]:
    """Yield theta after every round, in which all agents take part."""
    engines = [trainer.engine(rows) for rows in agents]
    rule = algorithm(terms)
    state = rule.init(trainer.theta)
    remembered = len(RULES[terms.strategy].remembers)
    nothing = tuple(np.zeros(len(trainer.theta), np.float32) for _ in range(remembered))
    memories = [nothing for _ in engines]
    for number in range(rounds):
        now = round_terms(terms, number, rounds)
        sent = []
        for index, engine in enumerate(engines):
            linear = rule.linear(state, memories[index])
            seed = number * len(engines) + index
            update = engine.train(state.theta, now, seed, _ignore, Unkept(), linear)
            one = outgoing(now, state, memories[index], update)
            memories[index] = one.memory
            sent.append(one)
        state = rule.apply(state, mean(sent), len(sent))
        yield state.theta


def mean(sent: Sequence[Outgoing]) -> Theta:
    """Return the weighted mean of the updates, in float64 and rounded once."""
    total = sum(one.weight for one in sent)
    summed = np.zeros(len(sent[0].values))
    for one in sent:
        summed += one.weight * one.values.astype(np.float64)
    return np.asarray(summed / total, np.float32)


def _ignore(share: float) -> None:
    del share
