"""A simulated run: its rounds one after another, kept as it goes."""

import functools
import math
import shutil
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import mkdtemp

from coordinator.plateau import BEGINNING
from coordinator.selection import Selection
from edge_agent.engine import Evaluation
from edge_agent.local_rules import remembered
from fedloom.adapters import Theta
from fedloom.errors import ConfigError
from fedloom.quality import Counts, Quality, local_quality
from fedloom.strategies import algorithm
from fedloom.strategies.portions import keeps_own_model, own_model
from simulation.conduct import Progress, Watch, conduct_round
from simulation.memories import Memories
from simulation.movers import Crew
from simulation.processes import MAX_WORKERS
from simulation.records import Records
from simulation.sums import Federation, RoundReport

Evaluate = Callable[[Theta], Evaluation | None]
_MEMORIES = "memories"
_JUDGES = 16  # clients whose own models are tried, at most
_ENGINES = ("local", "ray")


def require_simulable(selection: Selection) -> None:
    """Raise ConfigError for what of `[selection]` clients without hours and memory cannot meet."""
    needs = ("most_rounds", "least_memory_mb", "least_samples_per_second", "engine")
    for name in needs:
        if getattr(selection, name):
            raise ConfigError(
                f"selection.{name}",
                "expected none in a simulation, whose clients are equals and not remembered from "
                "round to round; leave it out of the file that is simulated",
            )


class Simulation:
    """A run that has come so far; `folder` keeps it, None forgets it with the object."""

    def __init__(
        self,
        federation: Federation,
        theta: Theta,
        records: Records,
        folder: Path | None,
        evaluate: Evaluate,
        progress: Progress | None = None,
        quality: Callable[[Evaluation], Quality] | None = None,
    ) -> None:
        require_simulable(federation.config.selection)
        self.federation = federation
        self.records = records
        self._evaluate = evaluate
        self._quality = quality
        terms, layout = federation.config.training, federation.plan.layout
        count = remembered(terms)
        where = (folder or self._unkept()) / _MEMORIES if count else Path()
        self._memories = Memories(where, count, len(theta), keeps_own_model(terms))
        self._initial = theta
        self.progress = (
            progress
            or records.restored(len(theta), terms)
            or Progress(algorithm(terms, layout).init(theta.copy()))
        )

    @property
    def finished(self) -> bool:
        """Whether no round is left, or the run has reached its plateau."""
        return self.progress.server.rounds >= self.federation.config.rounds or self._on_plateau

    @property
    def _on_plateau(self) -> bool:
        """Tell whether rounds got no better, as agents would report it.

        They measure the model that a round begins with: after n rounds that is the initial one, and
        those after the first n - 1.
        """
        rule = self.federation.config.plateau
        if not rule.patience:
            return False
        reports = self.records.reports()
        found = [self._first, *(self.records.evaluation(r.round) for r in reports[:-1])]
        plateau = BEGINNING
        for evaluation in found[: len(reports)]:
            quality = None if evaluation is None else self.quality(evaluation)
            plateau = plateau.after(rule, quality)
        return plateau.is_reached(rule)

    @functools.cached_property
    def _first(self) -> Evaluation | None:
        found = self._evaluate(self._initial)
        rule = self.federation.config.plateau
        if found is None or self.quality(found).value(rule.metric) is None:
            raise ConfigError(
                "evaluation.patience",
                f"expected held-out rows, and a task with {rule.metric.value}: they decide when "
                "the run has reached its plateau",
            )
        return found

    def quality(self, evaluation: Evaluation) -> Quality:
        """Return what an evaluation says."""
        if self._quality is not None:
            return self._quality(evaluation)
        return local_quality(evaluation, self.federation.plan.task)

    def next_round(
        self, crew: Crew, watch: Watch = lambda done, of: None
    ) -> tuple[RoundReport, Evaluation | None]:
        """Conduct a round and keep what it led to; raises Refused when the run fails."""
        progress, report = conduct_round(
            self.federation, self.progress, crew, self._memories, watch
        )
        self.records.trained(progress, report, self.federation.config.training)
        self.progress = progress
        return report, self.evaluation()

    def evaluation(self) -> Evaluation | None:
        """Return the quality of the model as it stands; it is measured once for each round."""
        number = self.progress.last.round
        if number == 0:
            return None
        known = self.records.evaluation(number)
        if known is None:
            known = self._evaluated()
            if known is not None:
                self.records.evaluated(number, known)
        return known

    def _evaluated(self) -> Evaluation | None:
        """Try the model; where clients have models of their own, those of some of them."""
        terms, layout = self.federation.config.training, self.federation.plan.layout
        theta, after = self.progress.server.theta, self.progress.last.round
        if not keeps_own_model(terms):
            return self._evaluate(theta)
        clients = self._memories.clients()
        found: list[Evaluation] = []
        for client in clients[:: math.ceil(len(clients) / _JUDGES)]:
            memory = self._memories.read(client, after, theta)
            evaluation = self._evaluate(own_model(terms, layout, theta, memory))
            if evaluation is None:
                return None
            found.append(evaluation)
        return pooled(found)

    def _unkept(self) -> Path:
        """Return a folder that ends with this object, or with the process."""
        folder = Path(mkdtemp(prefix="fedloom-simulation-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the quality of several models on the same rows, as if of one on all of them."""
    count = sum(one.count for one in evaluations)

    def mean(values: Iterable[float]) -> float:
        pairs = zip(evaluations, values, strict=True)
        return math.fsum(one.count * value for one, value in pairs) / count

    rows = (
        tuple(map(sum, zip(*(getattr(one.counts, field.name) for one in evaluations), strict=True)))
        for field in fields(Counts)
    )
    return Evaluation(
        count,
        sum(one.correct for one in evaluations),
        mean(one.mean_loss for one in evaluations),
        Counts(*rows),
        mean(one.mean_squared_error for one in evaluations),
    )


@dataclass(frozen=True)
class Staff:
    """Who trains: so many processes, or actors of Ray, of the cluster at `address` if it is said.

    Raises ConfigError for what cannot be.
    """

    workers: int
    engine: str = "local"
    address: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError("workers", f"expected 1..{MAX_WORKERS}, found {self.workers}")
        if self.engine not in _ENGINES:
            raise ConfigError("engine", f"expected one of {_ENGINES}, found {self.engine!r}")
        if self.address and self.engine != "ray":
            raise ConfigError("address", "expected none without ray, found one")
