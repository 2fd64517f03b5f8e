"""`fedloom-coordinator tune`: trials are simulations of a run file with some values changed."""

import hashlib
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.commands.output import console, say, say_json, say_table, warn
from edge_agent.engine import Evaluation
from fedloom.errors import ConfigError, Refused
from fedloom.logs import configure_logs
from fedloom.plans import load_plan
from fedloom.quality import Metric, local_quality, metrics_of
from fedloom.tasks import Task
from simulation.command_line import Held, Prepared, Request, checked, held_data, prepared
from simulation.models import PlanModel
from simulation.movers import Alone, Crew
from simulation.partitions import read_partition
from simulation.runs import Staff
from simulation.search import Candidate, Rules, Search, State, Trial, Unfit, alone_in
from simulation.search_results import (
    headings,
    line,
    rows,
    with_values,
    write_best,
    write_results,
)
from simulation.space import Space, Value, load_space, stated_values

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


def tune(request: TuneRequest, as_json: bool) -> None:
    """Search to the end, or until the time is over; raises ConfigError or Refused."""
    configure_logs(as_json, "error")
    read_partition(request.run.partition)
    base = _Base.read(request)
    space = load_space(request.space)
    rules = Rules(base.metric.rises, request.pruner, request.seed)
    with alone_in(base.out):
        stated = stated_values(tomllib.loads(base.text), list(space))
        whole = all(key in stated and found.has(stated[key]) for key, found in space.items())
        search = Search(
            base.out, space, rules, base.identity(request, space), stated if whole else None
        )
        _conduct(search, request, base, list(space), as_json)


def _conduct(
    search: Search, request: TuneRequest, base: "_Base", keys: list[str], as_json: bool
) -> None:
    known = len(search.trials)
    if known and not as_json:
        say(f"goes on after {known} of {request.trials} trials")
    until = time.monotonic() + request.seconds if request.seconds else float("inf")
    began = _Beginner(request.run, base)
    with _progress(request.trials, known, silent=as_json) as shown:

        def tell(trial: Trial) -> None:
            write_results(base.out, search.trials, keys, base.metric)
            if as_json:
                say_json(line(trial))
            else:
                shown(line_of(trial, request.trials, base.metric))

        search.conduct(
            began.begin, request.trials, request.jobs, lambda: time.monotonic() >= until, tell
        )
    write_results(base.out, search.trials, keys, base.metric)
    _close(search, request, base, keys, as_json)


def _close(
    search: Search, request: TuneRequest, base: "_Base", keys: list[str], as_json: bool
) -> None:
    """Tell what was found; raises ConfigError where no trial could run at all."""
    trials, best = search.trials, search.best
    refused = [trial for trial in trials if trial.state is State.REFUSED]
    if trials and len(refused) == len(trials):
        raise ConfigError(
            str(request.space),
            f"expected a trial that can run; all are refused: {refused[0].reason}",
        )
    file = None
    if best is not None:
        text = with_values(base.text, best.parameters)
        file = write_best(base.out, _with_plan(text, base.folder), _comment(best, request, base))
    if as_json:
        value = None if best is None else best.values[-1]
        states = {state.value: sum(t.state is state for t in trials) for state in State}
        number = None if best is None else best.number
        found = {"best": number, "metric": base.metric.value, "value": value}
        say_json({**found, "file": None if file is None else str(file), "trials": states})
        return
    say_table(headings(keys, base.metric), rows(trials, keys, base.metric))
    if best is None:
        warn(["no trial is finished yet: the same command goes on"])
    else:
        say(f"{file}: {base.metric.value} {best.values[-1]:.6g}, trial {best.number}")


def line_of(trial: Trial, count: int, metric: Metric) -> str:
    """Say how a trial went."""
    value = f"{metric.value} {trial.values[-1]:.6g} after " if trial.values else ""
    reason = f" ({trial.reason})" if trial.reason else ""
    chosen = ", ".join(f"{key} = {_shown(found)}" for key, found in trial.parameters.items())
    rounds = f"{len(trial.values)} round{'s' * (len(trial.values) != 1)}"
    return (
        f"trial {trial.number} of {count} {trial.state.value}{reason}: {value}{rounds}, "
        f"{trial.seconds:.1f} s; {chosen}"
    )


def _shown(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _comment(best: Trial, request: TuneRequest, base: "_Base") -> list[str]:
    run = request.run
    return [
        f"Found by `fedloom-coordinator tune {run.file.name} --space {request.space.name}`: trial "
        f"{best.number},",
        f"{base.metric.value} {best.values[-1]!r} on {run.held_out} after {len(best.values)} "
        "simulated rounds",
        f"with {run.agents or 'as many as the column has'} virtual clients (--partition "
        f"{run.partition}), search seed {request.seed}. What was searched:",
        *(f"  {key} = {value!r}" for key, value in best.parameters.items()),
    ]


@dataclass(frozen=True)
class _Base:
    """The run file that is varied."""

    text: str
    folder: Path  # where its relative paths start
    out: Path
    metric: Metric

    @classmethod
    def read(cls, request: TuneRequest) -> "_Base":
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
            "run": tomllib.loads(_with_plan(self.text, self.folder)),
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


def _with_plan(text: str, folder: Path) -> str:
    """Return a run file that can lie anywhere: its plan's folder is an absolute path."""
    plan = tomllib.loads(text)["plan"]
    return with_values(text, {"plan": str((folder / plan).resolve())})


class _Beginner:
    """Begins the runs of trials; data are read once for each plan."""

    def __init__(self, request: Request, base: _Base) -> None:
        self._request = request
        self._base = base
        self._held: dict[bytes, Held] = {}

    def begin(self, number: int, parameters: Mapping[str, Value]) -> Candidate:
        """Begin a trial, or go on with it; raises Unfit."""
        out = self._base.out / _TRIALS / f"{number:04}"
        request = replace(self._request, out=out)
        try:
            text = _with_plan(with_values(self._base.text, parameters), self._base.folder)
            config, model = checked(request, text, silent=True)
        except ConfigError as error:
            raise Unfit(error.problem) from error
        data = self._data(model)
        try:
            run = prepared(request, Staff(1), text, (config, model), data)
            return _Run(run, self._base.metric)
        except (ConfigError, Refused) as error:
            raise Unfit(str(error)) from error

    def _data(self, model: PlanModel) -> Held:
        key = hashlib.sha256(model.plan.encode()).digest()
        if key not in self._held:
            self._held[key] = held_data(model, self._request)
        return self._held[key]


class _Run:
    """See Candidate: a simulation."""

    def __init__(self, run: Prepared, metric: Metric) -> None:
        self._run = run
        self._metric = metric
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

    def close(self, kept: bool) -> None:
        """See Candidate."""
        if self._crew is not None:
            self._crew.close()
        if not kept:
            shutil.rmtree(self._run.out, ignore_errors=True)


@contextmanager
def _progress(count: int, known: int, silent: bool) -> Iterator[Callable[[str], None]]:
    """Show how many trials have ended where somebody looks; elsewhere say a line for each."""
    terminal = console()
    if silent or not terminal.is_terminal:
        yield say
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=terminal, transient=True) as progress:
        task = progress.add_task("", total=count, completed=known)

        def shown(text: str) -> None:
            say(text)
            progress.advance(task)

        yield shown
