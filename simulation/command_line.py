"""A run file, data and a partition become a simulated run, and what is seen of it."""

import hashlib
import json
import os
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from coordinator.commands.output import console, say, say_json, warn
from coordinator.config import RunConfig
from coordinator.run_checks import RunFile, Surroundings, check
from edge_agent.batches import Examples, Indices
from edge_agent.data import DataSource
from edge_agent.engine import Evaluation
from edge_agent.examples import read_examples
from edge_agent.records import ARCHIVES, TABLES, Selection, records
from fedloom.errors import ConfigError
from fedloom.logs import configure_logs
from simulation.clients import partitioned
from simulation.conduct import Watch
from simulation.learning import crew_of
from simulation.models import PlanModel, Work
from simulation.movers import Crew
from simulation.partitions import Partition, by_value, dirichlet, iid, read_partition
from simulation.records import Records
from simulation.runs import Simulation, Staff
from simulation.sums import Federation, RoundReport

_MODEL = "model"


@dataclass(frozen=True)
class Request:
    """What was typed."""

    file: Path
    agents: int
    data: Path
    partition: str
    held_out: Path | None
    text: str
    label: str
    arrays: tuple[str, ...]
    out: Path | None
    engine: str
    address: str
    workers: int


@dataclass(frozen=True)
class Prepared:
    """A run that can be conducted."""

    simulation: Simulation
    work: Work
    staff: Staff
    model: PlanModel
    out: Path


def conduct(request: Request, as_json: bool) -> None:
    """Conduct the run to its end; raises ConfigError or Refused."""
    configure_logs(as_json, "warning")
    prepared = prepare(request)
    simulation = prepared.simulation
    rounds = simulation.federation.config.rounds
    if simulation.progress.server.rounds and not as_json:
        say(f"goes on after round {simulation.progress.server.rounds} of {rounds}")
    simulation.evaluation()  # of a round after which the process before this one died
    if not simulation.finished:
        with crew_of(prepared.work, prepared.staff, simulation) as crew:
            while not simulation.finished:
                _conduct_one(simulation, crew, as_json)
    theta = simulation.progress.server.theta
    folder = prepared.out / _MODEL
    if not folder.exists():
        prepared.model.export(theta, folder)
    digest = hashlib.sha256(theta.data).hexdigest()
    if as_json:
        say_json({"rounds": rounds, "model": str(folder), "state_sha256": digest})
    else:
        say(f"{folder}: infer.onnx answers with the adapter of this run; state {digest[:12]}")


def _conduct_one(simulation: Simulation, crew: Crew, as_json: bool) -> None:
    began = time.monotonic()
    number = simulation.progress.server.rounds + 1
    with _bar(f"round {number}", silent=as_json) as watch:
        report, evaluation = simulation.next_round(crew, watch)
    seconds = time.monotonic() - began
    if as_json:
        quality = None if evaluation is None else asdict(evaluation)
        say_json({**asdict(report), "evaluation": quality, "seconds": round(seconds, 3)})
    else:
        say(line_of(report, evaluation, simulation.federation.config.rounds, seconds))


def line_of(report: RoundReport, evaluation: Evaluation | None, rounds: int, seconds: float) -> str:
    """Say how a round went."""
    failed = f", {report.failed} could not train" if report.failed else ""
    quality = ""
    if evaluation is not None:
        share = evaluation.correct / evaluation.count
        quality = f", accuracy {share:.1%}, loss {evaluation.mean_loss:.4f} on held-out data"
    return (
        f"round {report.round} of {rounds}: {report.clients} clients{failed}, "
        f"training loss {report.training_loss:.4f}{quality}, {seconds:.1f} s"
    )


@contextmanager
def _bar(title: str, silent: bool) -> Iterator[Watch]:
    """Show how many clients are done where somebody looks."""
    terminal = console()
    if silent or not terminal.is_terminal:
        yield lambda done, of: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=terminal, transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, of: progress.update(task, completed=done, total=of)


@dataclass(frozen=True)
class Held:
    """What there is to learn from, as examples of a plan's task."""

    whole: Examples  # the clients', together
    held_out: Examples | None


def prepare(request: Request) -> Prepared:
    """Read and check everything; raises ConfigError or Refused that names what is wrong."""
    staff = Staff(request.workers or cores(), request.engine, request.address)
    try:
        text = request.file.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(str(request.file), f"expected a TOML file: {error}") from error
    config, model = checked(request, text)
    return prepared(request, staff, text, (config, model), held_data(model, request))


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


def held_data(model: PlanModel, request: Request) -> Held:
    """Read what was typed, as the plan's examples."""
    whole = _examples(model, request, request.data)
    held_out = None if request.held_out is None else _examples(model, request, request.held_out)
    return Held(whole, held_out)


def prepared(
    request: Request, staff: Staff, text: str, run: tuple[RunConfig, PlanModel], data: Held
) -> Prepared:
    """Return the run of this file's `text`, with clients that hold the data."""
    config, model = run
    partition = read_partition(request.partition)
    whole = data.whole
    clients = partitioned(whole, _parts(partition, request, whole, config.training.seed))
    config = _fitting(config, len(clients))
    out = request.out or request.file.with_name(f"{config.name}.simulation")
    identity = {
        "run": json.loads(json.dumps(tomllib.loads(text), default=str)),
        "plan": hashlib.sha256(model.plan.encode()).hexdigest(),
        "data": whole.sha256.hex(),
        "partition": asdict(partition),
        "clients": len(clients),
    }
    named = json.dumps(identity, sort_keys=True).encode()
    federation = Federation(
        hashlib.sha256(named).digest()[:16],
        config,
        model.plan,
        {name: len(held) for name, held in clients.items()},
    )
    work = model.work(clients, data.held_out)
    simulation = Simulation(
        federation, model.theta, Records(out, identity), out, work.make().evaluate
    )
    return Prepared(simulation, work, staff, model, out)


def checked(request: Request, text: str, silent: bool = False) -> tuple[RunConfig, PlanModel]:
    """Check the file as a coordinator does that has these agents."""
    file = RunFile(text, request.file.name, request.file.absolute().parent)
    around = Surroundings(request.agents, 1 << 62, {}, lambda prefix: None)
    found = check(file, around)
    if found.problems or found.config is None or found.plan_folder is None:
        raise ConfigError(str(request.file), "; ".join(found.problems))
    if request.agents and not silent:
        warn(found.warnings)
    return found.config, PlanModel(found.plan_folder)


def _fitting(config: RunConfig, clients: int) -> RunConfig:
    if config.cohort.minimum > clients:
        raise ConfigError(
            "agents",
            f"expected at least cohort.minimum = {config.cohort.minimum} clients, found {clients}",
        )
    return config


def _examples(model: PlanModel, request: Request, path: Path) -> Examples:
    arrays = []
    for entry in request.arrays:
        name, equals, columns = entry.partition("=")
        if not (name and equals and columns):
            raise ConfigError("array", f"expected INPUT=COLUMN, found {entry!r}")
        arrays.append((name, tuple(columns.split(","))))
    source = DataSource(path, text=request.text, label=request.label, arrays=tuple(arrays))
    examples, broken = read_examples(model.folder, model.plan, source)
    if broken:
        warn([f"{path.name}: {broken} broken rows left out"])
    return examples


def _parts(partition: Partition, request: Request, whole: Examples, seed: int) -> list[Indices]:
    if partition.kind == "by":
        parts = by_value(_column(request.data, partition.column, len(whole)))
        if request.agents not in (0, len(parts)):
            raise ConfigError(
                "agents",
                f"expected none, or the {len(parts)} values of {partition.column}, "
                f"found {request.agents}",
            )
        return parts
    if partition.kind == "iid":
        return iid(len(whole), request.agents, seed)
    labels = np.asarray(whole.labels(np.arange(len(whole))))
    return dirichlet(labels, request.agents, partition.concentration, seed)


def _column(path: Path, column: str, rows: int) -> list[object]:
    selection = Selection((column,), (*TABLES, *ARCHIVES))
    values = [record.values for record in records(path, selection)]
    whole = [value[0] for value in values if isinstance(value, tuple)]
    if len(whole) != rows:
        raise ConfigError(
            "partition",
            f"expected a file whose rows are all usable with by:{column}, found {len(values)} rows "
            f"of which {rows} are",
        )
    return whole
