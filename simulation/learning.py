"""`FederatedLearning`: federated training on one machine in five lines, by the product's rules.

fl = FederatedLearning(model, loss_fn, optimizer)
fl.add_client(data)
fl.train(num_rounds=10)
model = fl.get_global_model()
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_agent.batches import Examples
from edge_agent.engine import Evaluation
from fedloom.adapters import Theta
from fedloom.errors import ConfigError
from simulation.clients import names
from simulation.conduct import Progress, Watch
from simulation.models import Model, ModuleModel, PlanModel, Work, module_quality
from simulation.movers import Alone, Crew
from simulation.processes import Processes
from simulation.records import Records
from simulation.runs import Simulation, Staff
from simulation.settings import Settings, Tables, training_of
from simulation.sums import Federation, RoundReport


@dataclass(frozen=True)
class FinishedRound:
    """One round: what its training came to, and the model's quality where data were held out."""

    report: RoundReport
    evaluation: Evaluation | None


class FederatedLearning:
    """Clients in this process, and the rounds that a coordinator would conduct with them.

    `model` is a torch module, which is copied, or a plan's folder; `loss_fn(logits, labels)` is a
    mean over rows, for a module. `optimizer`: see `settings.training_of`. `terms` are further
    tables as in run.toml, such as {"training": {"epochs": 2, "batch_size": 32}}. `held_out` is what
    the model is tried on after every round. `cohort_size` clients take part in a round, drawn by
    the seed; 0: all. `workers` processes train, or with `engine="ray"` actors, of the cluster at
    `address` or of this machine; results do not depend on who trains. `vectorise` trains small
    modules several clients at a time; None decides by the model. `head` names the part of a module
    that clients keep with `personal` = "fedper" or "fedrep". `out` keeps the run: the same
    calls after a crash go on from its last finished round.
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        optimizer: object = None,
        *,
        strategy: str = "fed_avg",
        protection: str = "plain",
        cohort_size: int = 0,
        seed: int = 0,
        terms: Tables | None = None,
        held_out: object = None,
        workers: int = 1,
        engine: str = "local",
        address: str = "",
        vectorise: bool | None = None,
        head: str = "",
        out: Path | None = None,
    ) -> None:
        self._staff = Staff(workers, engine, address)
        self._model = as_model(model, loss_fn, vectorise, head)
        self._settings = Settings(
            training_of(optimizer), strategy, protection, cohort_size, seed, terms or {}
        )
        self._held_out = None if held_out is None else self._model.examples(held_out)
        self._out = None if out is None else Path(out)
        self._asked = 0  # rounds, by all calls of `train`
        self._data: list[Examples] = []
        self._simulation: Simulation | None = None
        self.history: list[FinishedRound] = []  # of the rounds that `train` has seen

    def add_client(self, data: object) -> str:
        """Add a client and return its name.

        (inputs, labels) as arrays or tensors, or a torch Dataset; for a plan also a file's path.
        """
        self._data.append(self._model.examples(data))
        return names(len(self._data))[-1]

    def train(self, num_rounds: int, watch: Watch = lambda done, of: None) -> list[FinishedRound]:
        """Conduct so many further rounds and return them; raises Refused when a round fails."""
        if not self._data:
            raise ConfigError("clients", "expected add_client first, found no client")
        if num_rounds < 1:
            raise ConfigError("num_rounds", f"expected at least 1, found {num_rounds}")
        clients = dict(zip(names(len(self._data)), self._data, strict=True))
        work = self._model.work(clients, self._held_out)
        self._asked += num_rounds
        simulation = self._begun(clients, work)
        simulation.evaluation()  # of a round after which the process before this one died
        finished: list[FinishedRound] = []
        with crew_of(work, self._staff, simulation) as crew:
            while not simulation.finished:
                finished.append(FinishedRound(*simulation.next_round(crew, watch)))
                self.history.append(finished[-1])
        return finished

    def _begun(self, clients: Mapping[str, Examples], work: Work) -> Simulation:
        """Return the run with its present clients, going on from where it stands."""
        before = self._simulation
        config = self._settings.config(len(clients), self._asked)
        federation = Federation(
            _run_id(self._settings),
            config,
            self._model.plan,
            {name: len(held) for name, held in clients.items()},
        )
        if before is not None:
            before.federation = federation
            return before
        identity = {} if self._out is None else _identity(self._settings, self._model, clients)
        mover = work.make()
        self._simulation = Simulation(
            federation,
            self._model.theta,
            Records(self._out, identity),
            self._out,
            mover.evaluate,
            quality=None if isinstance(self._model, PlanModel) else module_quality,
        )
        return self._simulation

    @property
    def progress(self) -> Progress | None:
        """Where the run stands; None before `train`."""
        return None if self._simulation is None else self._simulation.progress

    def get_global_model(self) -> Any:
        """Return the trained module, a copy; for a plan its trained tensors by name."""
        return self._model.trained(self._theta())

    def export(self, folder: Path) -> None:
        """Write a plan's model as a device does."""
        if not isinstance(self._model, PlanModel):
            raise ConfigError("export", "expected a plan: a module is yours to save")
        self._model.export(self._theta(), folder)

    def _theta(self) -> Theta:
        return self._model.theta if self.progress is None else self.progress.server.theta


def as_model(
    model: Any,
    loss_fn: Callable[[Any, Any], Any] | None,
    vectorise: bool | None,
    head: str = "",
) -> Model:
    """Return what is trained; raises ConfigError for anything else."""
    if isinstance(model, str | Path):
        if head:
            raise ConfigError("head", "expected none with a plan, whose layout names it")
        if loss_fn is not None:
            raise ConfigError("loss_fn", "expected none with a plan, whose graphs have theirs")
        return PlanModel(Path(model))
    if not hasattr(model, "named_parameters"):
        found = type(model).__name__
        raise ConfigError("model", f"expected a torch module or a plan's folder, found {found}")
    if loss_fn is None:
        raise ConfigError("loss_fn", "expected loss_fn(logits, labels) with a torch module")
    return ModuleModel(model, loss_fn, vectorise, head)


@contextmanager
def crew_of(work: Work, staff: Staff, simulation: Simulation) -> Iterator[Crew]:
    """Give who trains, for as long as the block lasts."""
    config, plan = simulation.federation.config, simulation.federation.plan
    crew: Crew
    if staff.engine == "ray":
        from simulation.ray_crew import RayCrew

        crew = RayCrew(work.make, work.group, staff.workers, staff.address)
    elif staff.workers == 1:
        crew = Alone(work.make())
    else:
        terms, count = config.training, plan.parameter_count
        crew = Processes(work.make, work.group, staff.workers, terms, count, plan.layout)
    try:
        yield crew
    finally:
        crew.close()


def _run_id(settings: Settings) -> bytes:
    """Return what names the run in its seeds: equal settings draw alike."""
    return hashlib.sha256(f"FederatedLearning/{settings.seed}".encode()).digest()[:16]


def _identity(settings: Settings, model: Model, clients: Mapping[str, Examples]) -> dict[str, Any]:
    data = hashlib.sha256()
    for held in clients.values():
        data.update(held.sha256)
    said: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return {
        "settings": said,
        "model": hashlib.sha256(model.theta.data).hexdigest(),
        "data": data.hexdigest(),
        "clients": len(clients),
    }
