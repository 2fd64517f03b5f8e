"""`fedloom-coordinator tune`: trials are simulations of a run file with some values changed."""

import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from coordinator.commands.output import console, safe, say, say_json, say_table, warn
from fedloom.errors import ConfigError
from fedloom.logs import configure_logs
from fedloom.quality import Metric
from simulation.partitions import read_partition
from simulation.search import Rules, Search
from simulation.search_folder import alone_in
from simulation.search_results import (
    headings,
    line,
    rows,
    short,
    with_values,
    write_best,
    write_results,
)
from simulation.space import Value, load_space, stated_values
from simulation.trials import State, Trial
from simulation.tuned_runs import Base, Beginner, TuneRequest, with_plan


def tune(request: TuneRequest, as_json: bool) -> None:
    """Search to the end, or until the time is over; raises ConfigError or Refused."""
    configure_logs(as_json, "error")
    read_partition(request.run.partition)
    base = Base.read(request)
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
    search: Search, request: TuneRequest, base: Base, keys: list[str], as_json: bool
) -> None:
    known = len(search.trials)
    if known and not as_json:
        say(f"goes on after {known} of {request.trials} trials")
    until = time.monotonic() + request.seconds if request.seconds else float("inf")
    with _display(request.trials, known, silent=as_json) as display:
        began = Beginner(request.run, base, display.conducted)

        def tell(trial: Trial) -> None:
            write_results(base.out, search.trials, keys, base.metric)
            if as_json:
                say_json(line(trial))
            else:
                display.tell(line_of(trial, request.trials, base.metric))

        search.conduct(
            began.begin, request.trials, request.jobs, lambda: time.monotonic() >= until, tell
        )
    write_results(base.out, search.trials, keys, base.metric)
    _close(search, request, base, keys, as_json)


def _close(
    search: Search, request: TuneRequest, base: Base, keys: list[str], as_json: bool
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
        file = write_best(base.out, with_plan(text, base.folder), _comment(best, request, base))
    if as_json:
        value = None if best is None else best.values[-1]
        states = {state.value: sum(t.state is state for t in trials) for state in State}
        number = None if best is None else best.number
        found = {"best": number, "metric": base.metric.value, "value": value}
        say_json({**found, "file": None if file is None else str(file), "trials": states})
        return
    # Reasons were told, and stand in the file: here they would leave the numbers no room.
    head, cells = headings(short(keys), base.metric), rows(trials, keys, base.metric)
    say_table(head[:-1], [row[:-1] for row in cells])
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


def _comment(best: Trial, request: TuneRequest, base: Base) -> list[str]:
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
class _Display:
    """What is seen of a search: `tell` says how a trial went, `conducted` that a round is done."""

    tell: Callable[[str], None] = say
    conducted: Callable[[], None] = lambda: None


@contextmanager
def _display(count: int, known: int, silent: bool) -> Iterator[_Display]:
    """Show how far the search is where somebody looks; elsewhere say a line for each trial."""
    terminal = console()
    if silent or not terminal.is_terminal:
        yield _Display()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    rounds = TextColumn("trials, {task.fields[rounds]} rounds")
    columns = BarColumn(), MofNCompleteColumn(), rounds, TimeElapsedColumn()
    with Progress(*columns, console=terminal, transient=True) as progress:
        task = progress.add_task("", total=count, completed=known, rounds=0)

        def tell(text: str) -> None:
            progress.console.print(safe(text), soft_wrap=True)
            progress.advance(task)

        def conducted() -> None:
            progress.update(task, rounds=progress.tasks[task].fields["rounds"] + 1)

        yield _Display(tell, conducted)
