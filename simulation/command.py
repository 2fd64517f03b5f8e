"""`fedloom-coordinator simulate`: what is typed. Nothing heavy is imported before it is needed."""

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    file: Annotated[Path, typer.Argument(help="The run, as TOML.")],
    data: Annotated[Path, typer.Option(help="What the clients hold together, file or folder.")],
    agents: Annotated[
        int, typer.Option(help="Number of virtual clients; with by:COLUMN its values decide.")
    ] = 0,
    partition: Annotated[
        str, typer.Option(help="iid, dirichlet:CONCENTRATION or by:COLUMN.")
    ] = "iid",
    held_out: Annotated[
        Path | None, typer.Option(help="What the model is tried on after every round.")
    ] = None,
    text: Annotated[str, typer.Option(help="Column of texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of labels, or of values.")] = "label",
    array: Annotated[
        list[str] | None,
        typer.Option(help="INPUT=COLUMN or INPUT=FIRST..LAST, for plans of arrays; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the run; default: beside the file, NAME.simulation."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str, typer.Option(help="Of an existing Ray cluster; empty: here.")] = "",
    workers: Annotated[int, typer.Option(help="Processes or actors; 0: one for each core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line for each round.")] = False,
) -> None:
    """Conduct a run with virtual clients on this machine; killed, the same command goes on."""
    from simulation.command_line import Request, conduct

    request = Request(
        file,
        agents,
        data,
        partition,
        held_out,
        text,
        label,
        tuple(array or ()),
        out,
        engine,
        address,
        workers,
    )
    conduct(request, as_json)


def tune(
    file: Annotated[Path, typer.Argument(help="The run that is varied, as TOML.")],
    space: Annotated[Path, typer.Option(help="What is varied, and how: keys of the run file.")],
    data: Annotated[Path, typer.Option(help="What the clients hold together, file or folder.")],
    held_out: Annotated[Path, typer.Option(help="What decides which trial is better.")],
    agents: Annotated[
        int, typer.Option(help="Number of virtual clients; with by:COLUMN its values decide.")
    ] = 0,
    partition: Annotated[
        str, typer.Option(help="iid, dirichlet:CONCENTRATION or by:COLUMN.")
    ] = "iid",
    metric: Annotated[
        str, typer.Option(help="Such as accuracy, macro_f1, loss; empty: the task's first.")
    ] = "",
    trials: Annotated[int, typer.Option(help="How many there shall be, with earlier ones.")] = 30,
    seconds: Annotated[
        float, typer.Option(help="After which the search pauses; 0: when the trials are done.")
    ] = 0.0,
    jobs: Annotated[int, typer.Option(help="Trials at a time; as many proposals are made.")] = 1,
    pruner: Annotated[str, typer.Option(help="median, asha or none: which trials end early.")] = (
        "median"
    ),
    seed: Annotated[int, typer.Option(help="Equal seeds and jobs propose equal trials.")] = 0,
    text: Annotated[str, typer.Option(help="Column of texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of labels, or of values.")] = "label",
    array: Annotated[
        list[str] | None,
        typer.Option(help="INPUT=COLUMN or INPUT=FIRST..LAST, for plans of arrays; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the search; default: beside the file, NAME.tuning."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line for each trial.")] = False,
) -> None:
    """Search for the best values of a run by simulating it; killed, the same command goes on."""
    from simulation.command_line import Request
    from simulation.tuned_runs import TuneRequest
    from simulation.tuning import tune as search

    arrays = tuple(array or ())
    run = Request(
        file, agents, data, partition, held_out, text, label, arrays, out, "local", "", workers=1
    )
    search(TuneRequest(run, space, metric, trials, seconds, jobs, pruner, seed), as_json)
