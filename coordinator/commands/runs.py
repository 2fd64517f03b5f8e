"""`fedloom-coordinator run …`"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.commands.connection import (
    DEFAULT_HOME,
    AsJson,
    Coordinator,
    Home,
    Operator,
    Where,
    is_served,
    reached,
)
from coordinator.commands.output import age, console, say, say_json, say_table, warn
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from coordinator.admin_client import AdminClient
    from coordinator.progress import RunProgress
    from coordinator.summaries import RunSummary

run_app = typer.Typer(help="Runs: rounds of training over a plan.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(help="Id of a run, or the start of it.")]
RunOrNewest = Annotated[
    str, typer.Argument(help="Id of a run, or the start of it; default: the newest.")
]
AGENTS_ASKED_FOR = 1_000
SHORT_ID = 12  # hexadecimal digits: enough to tell runs apart, and a table fits its terminal
RETRY_SECONDS, RETRIES = 1.0, 30
INTERRUPTED = 130  # as shells say it of SIGINT


@run_app.command("start")
def start(
    file: Annotated[Path, typer.Argument(help="The run, as TOML.")],
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Check a run file as a whole and queue the run; prints its id."""
    from coordinator.admin_client import NotStarted

    where = Where(home, coordinator, operator)
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), f"expected a TOML file: {error}") from error
    folder = None if where.is_elsewhere else file.absolute().parent
    with reached(where) as client:
        started = client.start_run(os.urandom(16), text, file.name, folder)
    if isinstance(started, NotStarted):
        if as_json:
            say_json({"problems": started.problems, "warnings": started.warnings})
        warn(started.warnings)
        raise ConfigError(str(file), "; ".join(started.problems))
    run, warnings = started
    if as_json:
        say_json({"run": run.run_id.hex(), "warnings": warnings})
    else:
        say(run.run_id.hex())
        warn(warnings)


@run_app.command("list")
def list_runs(
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    with reached(Where(home, coordinator, operator)) as client:
        runs = list(client.runs())
    if as_json:
        say_json([run.to_json() for run in runs])
        return
    now = time.time()
    say_table(
        ("run", "name", "state", "rounds", "agents", "started"),
        (
            (
                run.run_id.hex()[:SHORT_ID],
                run.name,
                _state(run),
                f"{run.completed} of {run.rounds}",
                run.agents,
                age(run.created_at, now),
            )
            for run in runs
        ),
    )


def _state(run: "RunSummary") -> str:
    if run.state == "failed" and run.reason is not None:
        return f"failed: {run.reason.name}"
    return f"{run.state} early: {run.early_end}" if run.early_end else run.state


@run_app.command("watch")
def watch(
    run: RunOrNewest = "",
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state as JSON.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="With --json: a line for each change, to the end.")
    ] = False,
) -> None:
    """Follow a run to its end; exit status 1 when it fails."""
    where = Where(home, coordinator, operator)
    with reached(where) as client:
        run_id = find_run(client, run).run_id
        if as_json and not follow:
            (last,) = client.watch(run_id, follow=False, agent_limit=AGENTS_ASKED_FOR)
            say_json(last.to_json())
    if not as_json or follow:
        try:
            last = _follow(_progress(where, run_id), as_json)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    if last.run.reason is not None:
        raise typer.Exit(1)


def _progress(where: Where, run_id: bytes) -> "Iterator[RunProgress]":
    """Yield what changes, to the end of the run, also across restarts of the coordinator."""
    from coordinator.admin_client import Unreachable

    failures = 0
    while True:
        try:
            with reached(where) as client:
                for progress in _watched(client, where, run_id):
                    failures = 0
                    yield progress
                    if progress.run.phase.over:
                        return
        except Unreachable:
            failures += 1
            if failures > RETRIES:
                raise
            time.sleep(RETRY_SECONDS)


def _watched(client: "AdminClient", where: Where, run_id: bytes) -> "Iterator[RunProgress]":
    """Yield states of the run; ends early when a coordinator begins to serve the folder."""
    if not client.is_private:
        yield from client.watch(run_id, follow=True, agent_limit=AGENTS_ASKED_FOR)
        return
    before = None
    while not is_served(where):
        (state,) = client.watch(run_id, follow=False, agent_limit=AGENTS_ASKED_FOR)
        if state != before:
            yield state
        before = state
        time.sleep(RETRY_SECONDS)


def _follow(states: "Iterator[RunProgress]", as_json: bool) -> "RunProgress":
    """Show each state as it comes and return the last one."""
    terminal = console()
    if as_json:
        for state in states:
            say_json(state.to_json())
        return state
    from coordinator import run_view

    if terminal.is_terminal:
        from rich.live import Live

        state = next(states)

        def drawn() -> "RenderableType":  # several times a second: the time that is left runs
            rounds, agents = run_view.rows_for(terminal.height)
            return run_view.draw(state, terminal.width, rounds, agents, time.time())

        try:
            with Live(console=terminal, get_renderable=drawn, transient=True):
                for later in states:
                    state = later
        finally:  # also when the operator has seen enough
            terminal.print(_last_look(state, terminal))
        return state
    before: RunProgress | None = None
    for state in states:
        for line in run_view.lines(state, before):
            say(line)
        before = state
    terminal.print(_last_look(state, terminal))
    return state


def _last_look(state: "RunProgress", terminal: "Console") -> "RenderableType":
    from coordinator import run_view

    return run_view.draw(state, terminal.width, run_view.MAX_ROUNDS_SHOWN, 0, time.time())


def _wish(where: Where, run: str, wish: str, as_json: bool) -> None:
    from coordinator.run_state import Wish

    with reached(where) as client:
        found = client.wish(find_run(client, run).run_id, Wish(wish))
    if as_json:
        say_json(found.to_json())
    else:
        say(f"{found.run_id.hex()}: {found.state}")


@run_app.command("pause")
def pause(
    run: Run,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Have a run wait after the round that it is in."""
    _wish(Where(home, coordinator, operator), run, "pause", as_json)


@run_app.command("resume")
def resume(
    run: Run,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Let a paused run go on."""
    _wish(Where(home, coordinator, operator), run, "run", as_json)


@run_app.command("cancel")
def cancel(
    run: Run,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """End a run for good; agents keep the adapter of its last finished round."""
    _wish(Where(home, coordinator, operator), run, "cancel", as_json)


@run_app.command("privacy")
def privacy(
    run: RunOrNewest = "",
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Say what each party can learn from a run, as its stored terms imply."""
    with reached(Where(home, coordinator, operator)) as client:
        report = client.privacy(find_run(client, run).run_id)
    if as_json:
        say_json(report.to_json())
        return
    terms = report.to_json()
    say(
        f"run {report.run.name}: {terms['protection']}, sums are released to the "
        f"{terms['release']}, {report.minimum} updates at least in a sum"
    )
    say_table(("party", "can learn"), report.lines)


@run_app.command("export")
def export(
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    run: RunOrNewest = "",
    form: Annotated[
        list[str] | None,
        typer.Option(help="onnx, merged, merged-int8, peft, safetensors; several: a,b. [onnx]"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Prune the adapter to this rank; as it was trained.")
    ] = None,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model where the coordinator can read it.

    Under the protections plain and masked, and with release = "coordinator". README.md in the
    folder says what the model is, and how each form is loaded.
    """
    from coordinator.model_download import download_model
    from fedloom.export_forms import read_forms

    forms = read_forms(form or ())
    where = Where(home, coordinator, operator)
    with reached(where) as client:
        run_id = find_run(client, run).run_id
        exported = download_model(client, run_id, out, forms, rank or 0)
    if as_json:
        said = {"files": exported.files, "compared": exported.compared}
        say_json({"run": run_id.hex(), "folder": str(out), **said})
        return
    for line in exported.lines(out):
        say(line)


@run_app.command(
    "evaluate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def evaluate(
    context: typer.Context,
    run: Run,
    data: Annotated[Path, typer.Option(help="Labelled file, or folder of them, on this machine.")],
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run's model on a labelled file, where the coordinator can read it.

    Other options, such as --text and --label for the columns, are those of the command that this
    starts on the exported model, `fedloom-agent evaluate`.
    """
    from tempfile import TemporaryDirectory

    from coordinator.commands.evaluation import evaluated
    from coordinator.model_download import download_model

    with TemporaryDirectory(prefix="fedloom-evaluate-") as folder:
        model = Path(folder) / "model"
        with reached(Where(home, coordinator, operator)) as client:
            run_id = find_run(client, run).run_id
            download_model(client, run_id, model)
        found = evaluated(model, data, context.args)
    if as_json:
        say_json({"run": run_id.hex(), **found})
        return
    say(f"{found['rows']:,} rows, {found['labels']:,} labels")
    say_table(
        ("metric", "value"), ((name, f"{value:.4f}") for name, value in found["metrics"].items())
    )


def find_run(client: "AdminClient", prefix: str) -> "RunSummary":
    """Return the one run whose id starts so, or the newest one."""
    found: list[RunSummary] = []
    for run in client.runs(prefix.lower()):
        found.append(run)
        if not prefix or len(found) > 1:
            break
    if len(found) != 1:
        count = "none" if not found else "several"
        raise ConfigError("run", f"expected the id of one run, found {count} for {prefix!r}")
    return found[0]
