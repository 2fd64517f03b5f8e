"""What a search may vary: `space.toml`, whose keys are those of a run file.

"training.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
"training.epochs" = { low = 1, high = 4 }                # integers; step = 1 where nothing is said
"training.batch_size" = [8, 16, 32]                      # one of these
"training.strategy" = ["fed_avg", "fed_adam"]

Tables may be nested as in a run file. Every problem is named at once.
"""

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.config import known_keys, parse_run_config
from fedloom.errors import ConfigError

Value = str | bool | int | float
_FIELDS = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included; `step` 0: any; integers where `whole`."""

    low: float
    high: float
    whole: bool
    log: bool = False
    step: float = 0

    def has(self, value: Value) -> bool:
        """Whether a search could try the value."""
        if isinstance(value, str | bool) or not self.low <= value <= self.high:
            return False
        turns = (value - self.low) / self.step if self.step else 0.0
        return abs(turns - round(turns)) < 1e-9


@dataclass(frozen=True)
class Choice:
    """One of these."""

    values: tuple[Value, ...]

    def has(self, value: Value) -> bool:
        """Whether a search could try the value."""
        return value in self.values


Dimension = Interval | Choice
Space = Mapping[str, Dimension]  # by the run file's key, in the file's order


def load_space(path: Path) -> Space:
    """Read and check `space.toml`; raises ConfigError that names every problem."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"expected a TOML file: {error}") from error
    problems: list[str] = []
    space: dict[str, Dimension] = {}
    known = known_keys()
    for key, stated in _stated(table):
        if key not in known:
            problems.append(f"{key}: unknown key of a run file; known are {', '.join(known)}")
        elif key == "rounds" and isinstance(stated, dict) and stated.get("log"):
            problems.append("rounds: expected no log, since trials are compared round by round")
        else:
            found = _dimension(stated, known[key])
            if isinstance(found, str):
                problems.append(f"{key}: {found}")
            else:
                space[key] = found
                problems += _unknown_names(key, found)
    if not table:
        problems.append("expected at least one key of a run file, found none")
    if problems:
        raise ConfigError(str(path), "; ".join(problems))
    return space


def _stated(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value and not _FIELDS & set(value):
            yield from _stated(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _dimension(stated: object, kind: type) -> Dimension | str:
    """Return what is said of a key with such values; a text says what is wrong."""
    if isinstance(stated, list):
        return _choice(stated, kind)
    if not isinstance(stated, dict):
        return f"expected a list, or a table with low and high, found {stated!r}"
    if kind not in (int, float):
        return f"expected a list of {kind.__name__}, found a table"
    if unknown := sorted(set(stated) - _FIELDS):
        return f"expected low, high, log and step, found {', '.join(unknown)}"
    if problem := _interval_problem(stated, kind):
        return problem
    step = stated.get("step", 1 if kind is int and not stated.get("log") else 0)
    numbers = [kind(stated["low"]), kind(stated["high"]), kind(step)]
    low, high, step = numbers
    return Interval(low, high, kind is int, stated.get("log", False), step)


def _choice(values: list[Any], kind: type) -> Choice | str:
    if kind is float:
        values = [float(v) if type(v) is int else v for v in values]
    if not values or any(type(value) is not kind for value in values):
        return f"expected a list of {kind.__name__}, found {values!r}"
    if len(set(values)) < len(values) or any(value != value for value in values):
        return f"expected different values, found {values!r}"
    return Choice(tuple(values))


def _interval_problem(stated: Mapping[str, Any], kind: type) -> str:
    numbers = (int,) if kind is int else (int, float)
    for name in ("low", "high", "step"):
        value = stated.get(name, 1 if name == "step" else None)
        if type(value) not in numbers or not math.isfinite(value):
            return f"expected {name} as {kind.__name__}, found {value!r}"
    log = stated.get("log", False)
    if type(log) is not bool:
        return f"expected log as true or false, found {log!r}"
    if not stated["low"] < stated["high"]:
        return f"expected low < high, found {stated['low']} and {stated['high']}"
    if log and (stated["low"] <= 0 or "step" in stated):
        return "expected low above 0, and no step, with log"
    if stated.get("step", 1) <= 0:
        return f"expected step above 0, found {stated['step']}"
    return ""


def _unknown_names(key: str, dimension: Dimension) -> Iterator[str]:
    """Say which texts of a choice no run file could have under this key."""
    if not isinstance(dimension, Choice) or not isinstance(dimension.values[0], str):
        return
    for value in dimension.values:
        try:
            parse_run_config(nested({key: value}), Path("run.toml"))
        except ConfigError as error:
            said = error.problem.split("; ")
            yield from (problem for problem in said if problem.startswith(f"{key}: expected one"))


def nested(values: Mapping[str, Value]) -> dict[str, Any]:
    """Return values by dotted key as the tables of a run file."""
    table: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        place = table
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return table


def stated_values(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Value]:
    """Return what a run file says of these keys, as far as it does."""
    found: dict[str, Value] = {}
    for key in keys:
        place: Any = table
        for part in key.split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        if isinstance(place, str | bool | int | float):
            found[key] = place
    return found
