"""What a search varies and what its trials are: a run file, and simulations of it."""

import hashlib
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_agent.engine import Evaluation
from fedloom.errors import ConfigError, Refused
from fedloom.plans import load_plan
from fedloom.quality import Metric, local_quality, metrics_of
from fedloom.tasks import Task
from simulation.command_line import Held, Prepared, Request, checked, held_data, prepared
from simulation.models import PlanModel
from simulation.movers import Alone, Crew
from simulation.runs import Staff
from simulation.search_results import with_values
from simulation.space import Space, Value
from simulation.trials import Candidate, Unfit

_TRIALS = "trials"
MAX_TRIALS, MAX_JOBS = 10_000, 64


@dataclass(frozen=True)
class TuneRequest:
    """What was typed; `run` is what a simulation of the file would be asked for."""

    run: Request
    space: Path
    metric: str
    trials: int
    seconds: float
    jobs: int
    pruner: str
    seed: int

    def __post_init__(self) -> None:
        for name, value, most in (
            ("trials", self.trials, MAX_TRIALS),
            ("jobs", self.jobs, MAX_JOBS),
        ):
            if not 1 <= value <= most:
                raise ConfigError(name, f"expected 1..{most}, found {value}")
        if not self.seconds >= 0:
            raise ConfigError("seconds", f"expected 0 or more, found {self.seconds}")
        if self.run.held_out is None:
            raise ConfigError("held-out", "expected the rows that decide which trial is better")


@dataclass(frozen=True)
class Base:
    """The run file that is varied."""

    text: str
    folder: Path  # where its relative paths start
    out: Path
    metric: Metric

    @classmethod
    def read(cls, request: TuneRequest) -> "Base":
        file = request.run.file
        try:
            text = file.read_text()
            table = tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise ConfigError(str(file), f"expected a TOML file: {error}") from error
        folder = file.absolute().parent
        out = request.run.out or file.with_name(f"{file.stem}.tuning")
        plan = table.get("plan")
        if not isinstance(plan, str) or "\0" in plan:
            raise ConfigError(str(file), f"plan: expected the folder of a plan, found {plan!r}")
        return cls(text, folder, out, _metric(request.metric, load_plan(folder / plan).task))

    def identity(self, request: TuneRequest, space: Space) -> dict[str, Any]:
        """Return what the search follows from."""
        run = request.run
        return {
            "run": tomllib.loads(with_plan(self.text, self.folder)),
            "space": {key: asdict(found) for key, found in space.items()},
            "metric": self.metric.value,
            "data": [str(run.data.absolute()), str(run.held_out and run.held_out.absolute())],
            "columns": [run.text, run.label, *run.arrays],
            "clients": [run.agents, run.partition],
            "pruner": request.pruner,
            "seed": request.seed,
        }


def _metric(name: str, task: Task) -> Metric:
    known = metrics_of(task)
    # A perplexity is there wherever a loss is; tables leave it out where nobody asks for it.
    usable = {metric.value: metric for metric in (*known, Metric.PERPLEXITY)}
    if name and name not in usable:
        raise ConfigError("metric", f"expected one of {', '.join(usable)}, found {name!r}")
    return usable[name] if name else known[0]


def with_plan(text: str, folder: Path) -> str:
    """Return a run file that can lie anywhere: its plan's folder is an absolute path."""
    plan = tomllib.loads(text)["plan"]
    return with_values(text, {"plan": str((folder / plan).resolve())})


class Beginner:
    """Begins the runs of trials; data are read once for each plan."""

    def __init__(self, request: Request, base: Base, conducted: Callable[[], None]) -> None:
        self._request = request
        self._base = base
        self._conducted = conducted
        self._held: dict[bytes, Held] = {}

    def begin(self, number: int, parameters: Mapping[str, Value]) -> Candidate:
        """Begin a trial, or go on with it; raises Unfit."""
        out = self._base.out / _TRIALS / f"{number:04}"
        request = replace(self._request, out=out)
        try:
            text = with_plan(with_values(self._base.text, parameters), self._base.folder)
            config, model = checked(request, text, silent=True)
        except ConfigError as error:
            raise Unfit(error.problem) from error
        data = self._data(model)
        try:
            run = prepared(request, Staff(1), text, (config, model), data)
            return _Run(run, self._base.metric, self._conducted)
        except (ConfigError, Refused) as error:
            raise Unfit(str(error)) from error

    def _data(self, model: PlanModel) -> Held:
        key = hashlib.sha256(model.plan.encode()).digest()
        if key not in self._held:
            self._held[key] = held_data(model, self._request)
        return self._held[key]


class _Run:
    """See Candidate: a simulation."""

    def __init__(self, run: Prepared, metric: Metric, conducted: Callable[[], None]) -> None:
        self._run = run
        self._metric = metric
        self._conducted = conducted
        self._crew: Crew | None = None
        run.simulation.evaluation()  # of a round after which the process before this one died

    @property
    def values(self) -> list[float]:
        """See Candidate."""
        records = self._run.simulation.records
        found = [records.evaluation(report.round) for report in records.reports()]
        return [self._value(evaluation) for evaluation in found if evaluation is not None]

    def _value(self, evaluation: Evaluation) -> float:
        value = local_quality(evaluation, self._run.model.plan.task).value(self._metric)
        assert value is not None  # noqa: S101 - the task has this metric
        return value

    @property
    def finished(self) -> bool:
        """See Candidate."""
        return self._run.simulation.finished

    def advance(self) -> None:
        """See Candidate."""
        if self._crew is None:
            self._crew = Alone(self._run.work.make())
        self._run.simulation.next_round(self._crew)
        self._conducted()

    def close(self, kept: bool) -> None:
        """See Candidate."""
        if self._crew is not None:
            self._crew.close()
        if not kept:
            shutil.rmtree(self._run.out, ignore_errors=True)
