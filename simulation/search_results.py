"""What a search leaves for people and programs: a table, the best run file, trials line by line."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedloom.quality import Metric
from simulation.space import Value, nested
from simulation.trials import State, Trial

TABLE_FILE, BEST_FILE, TRIALS_FILE = "results.md", "best.toml", "trials.jsonl"
_ORDER = {State.FINISHED: 0, State.OPEN: 1, State.STOPPED: 2, State.REFUSED: 3}


def headings(keys: Sequence[str], metric: Metric) -> list[str]:
    """Return what stands over the columns of `rows`."""
    return ["trial", "state", metric.value, "rounds", "seconds", *keys, "reason"]


def short(keys: Sequence[str]) -> list[str]:
    """Return the keys without their tables, where that says as much."""
    names = [key.rpartition(".")[2] for key in keys]
    return [name if names.count(name) == 1 else key for name, key in zip(names, keys, strict=True)]


def rows(trials: Sequence[Trial], keys: Sequence[str], metric: Metric) -> list[list[str]]:
    """Return the trials as cells, finished ones first, the best on top."""
    sign = -1.0 if metric.rises else 1.0

    def place(trial: Trial) -> tuple[int, float, int]:
        value = sign * trial.values[-1] if trial.state is State.FINISHED else 0.0
        return _ORDER[trial.state], value, trial.number

    return [
        [
            str(trial.number),
            trial.state.value,
            f"{trial.values[-1]:.6g}" if trial.values else "",
            str(len(trial.values)),
            f"{trial.seconds:.1f}",
            *(_cell(trial.parameters.get(key, "")) for key in keys),
            trial.reason,
        ]
        for trial in sorted(trials, key=place)
    ]


def _cell(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def line(trial: Trial) -> dict[str, Any]:
    """Return a trial as JSON."""
    return {**asdict(trial), "state": trial.state.value}


def write_results(
    folder: Path, trials: Sequence[Trial], keys: Sequence[str], metric: Metric
) -> None:
    """Write the table and the trials' lines anew."""
    head = headings(keys, metric)
    lines = [head, ["---"] * len(head), *rows(trials, keys, metric)]
    table = "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"
        for cells in lines
    )
    stopped = sum(trial.state is State.STOPPED for trial in trials)
    conducted = sum(len(trial.values) for trial in trials)
    _replace(
        folder / TABLE_FILE,
        f"# {len(trials)} trials by {metric.value}, {'more' if metric.rises else 'less'} is "
        f"better\n\n{table}\n{conducted} rounds were conducted; {stopped} trials ended early.\n",
    )
    _replace(folder / TRIALS_FILE, "".join(f"{json.dumps(line(trial))}\n" for trial in trials))


def write_best(folder: Path, text: str, comment: Sequence[str]) -> Path:
    """Write the run file, complete, under a comment on how it was found."""
    path = folder / BEST_FILE
    _replace(path, "".join(f"# {said}\n" for said in comment) + "\n" + text.lstrip("\n"))
    return path


def with_values(text: str, values: Mapping[str, Value]) -> str:
    """Return a run file that says these values; its comments and order stay."""
    import tomlkit

    document = tomlkit.parse(text)
    _set(document, nested(values))
    changed = tomlkit.dumps(document)
    wanted = tomllib.loads(text)
    _set(wanted, nested(values))
    # A dotted key of a table that is stated elsewhere can come out as another: then plainly.
    return changed if _reads_as(changed, wanted) else tomlkit.dumps(wanted)


def _set(table: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            if name not in table:
                table[name] = {}
            _set(table[name], value)
        else:
            table[name] = value


def _reads_as(text: str, wanted: Mapping[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == wanted
    except ValueError:
        return False


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)
