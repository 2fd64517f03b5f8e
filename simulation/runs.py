"""A simulated run: its rounds one after another, kept as it goes."""

import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from coordinator.selection import Selection
from edge_agent.engine import Evaluation
from edge_agent.local_rules import remembered
from fedloom.adapters import Theta
from fedloom.errors import ConfigError
from fedloom.strategies import algorithm
from simulation.conduct import Progress, Watch, conduct_round
from simulation.memories import Memories
from simulation.movers import Crew
from simulation.processes import MAX_WORKERS
from simulation.records import Records
from simulation.sums import Federation, RoundReport

Evaluate = Callable[[Theta], Evaluation | None]
_MEMORIES = "memories"
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
    ) -> None:
        require_simulable(federation.config.selection)
        self.federation = federation
        self.records = records
        self._evaluate = evaluate
        terms = federation.config.training
        count = remembered(terms)
        where = (folder or self._unkept()) / _MEMORIES if count else Path()
        self._memories = Memories(where, count, len(theta))
        self.progress = (
            progress
            or records.restored(len(theta), terms)
            or Progress(algorithm(terms).init(theta.copy()))
        )

    @property
    def finished(self) -> bool:
        """Whether no round is left."""
        return self.progress.server.rounds >= self.federation.config.rounds

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
            known = self._evaluate(self.progress.server.theta)
            if known is not None:
                self.records.evaluated(number, known)
        return known

    def _unkept(self) -> Path:
        """Return a folder that ends with this object, or with the process."""
        folder = Path(mkdtemp(prefix="fedloom-simulation-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder


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
