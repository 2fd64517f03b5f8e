"""The tables of `agent.toml` that say what the data are and what is done to them."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from edge_agent.data import DataSource, Treatment, UnknownLabels
from edge_agent.scrubbing import NO_SCRUB, Kind, Scrub
from fedloom.errors import ConfigError

_COLUMNS = ("text", "label", "words", "tags")
_SOURCE = {"path", *_COLUMNS, "prompt", "answer", "arrays"}
DATA_KEYS = {
    "data": {*_SOURCE, "unknown_labels"},
    "held_out": _SOURCE,
    "split": {"held_out"},
    "privacy": {"scrub", "phone_region", "names_model"},
}
_DEFAULTS = {field.name: field.default for field in fields(DataSource)}
_Table = Mapping[str, Any]


def read_sources(path: Path, table: _Table) -> tuple[DataSource, DataSource | None]:
    """Return what to train on and what is held out; raises ConfigError that names the key."""
    data = _source(path, table, "data")
    if data is None:
        raise ConfigError(str(path), "data.path: expected the file or folder to train on")
    held_out = _source(path, table, "held_out")
    treatment = Treatment(_unknown_labels(path, table), _scrub(path, table))
    return (
        replace(data, treatment=treatment),
        None if held_out is None else replace(held_out, treatment=treatment),
    )


def read_held_out_share(path: Path, table: _Table) -> float:
    """Return the share of rows that is held out of [data], 0 for none."""
    share = table.get("split", {}).get("held_out", 0.0)
    if type(share) not in (int, float) or not 0 <= share <= 0.5:
        raise ConfigError(str(path), f"split.held_out: expected 0..0.5, found {share!r}")
    if share and "path" in table.get("held_out", {}):
        raise ConfigError(str(path), "split.held_out: expected a share or [held_out], found both")
    return float(share)


def _source(path: Path, table: _Table, section: str) -> DataSource | None:
    values = table.get(section, {})
    if "path" not in values:
        return None
    for key, value in values.items():
        if key != "arrays" and not isinstance(value, str):
            raise ConfigError(str(path), f"{section}.{key}: expected text, found {value!r}")
    given = {key: values[key] for key in (*_COLUMNS, "prompt", "answer") if key in values}
    arrays = _arrays(path, f"{section}.arrays", values.get("arrays", {}))
    return DataSource((path.parent / values["path"]).resolve(), arrays=arrays, **given)


def _arrays(path: Path, where: str, table: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(table, dict):
        raise ConfigError(str(path), f"{where}: expected a table of columns, found {table!r}")
    arrays = []
    for name, columns in table.items():
        several = [columns] if isinstance(columns, str) else columns
        if not (isinstance(several, list) and several and all(map(_is_name, several))):
            raise ConfigError(
                str(path), f"{where}.{name}: expected names or ranges `a..b`, found {columns!r}"
            )
        arrays.append((name, tuple(several)))
    return tuple(arrays)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _unknown_labels(path: Path, table: _Table) -> UnknownLabels:
    found = table["data"].get("unknown_labels", UnknownLabels.REFUSE)
    if found not in set(UnknownLabels):
        expected = sorted(UnknownLabels)
        raise ConfigError(
            str(path), f"data.unknown_labels: expected one of {expected}, found {found!r}"
        )
    return UnknownLabels(found)


def _scrub(path: Path, table: _Table) -> Scrub:
    values = table.get("privacy", {})
    kinds = values.get("scrub", [])
    if not isinstance(kinds, list) or not all(kind in set(Kind) for kind in kinds):
        raise ConfigError(
            str(path), f"privacy.scrub: expected a list of {sorted(Kind)}, found {kinds!r}"
        )
    for key in ("phone_region", "names_model"):
        if not isinstance(values.get(key, ""), str):
            raise ConfigError(str(path), f"privacy.{key}: expected text, found {values[key]!r}")
    model = values.get("names_model")
    return Scrub(
        tuple(Kind(kind) for kind in kinds),
        values.get("phone_region"),
        None if model is None else (path.parent / model).resolve(),
    )


def source_lines(source: DataSource) -> list[str]:
    """Return the lines of a source's table."""
    lines = [f"path = {_quoted(str(source.path))}"]
    for key in (*_COLUMNS, "prompt", "answer"):
        value = getattr(source, key)
        if key in ("text", "label") or value != _DEFAULTS[key]:
            lines.append(f"{key} = {_quoted(value)}")
    if source.arrays:
        inputs = (
            f"{_quoted(name)} = [{', '.join(map(_quoted, columns))}]"
            for name, columns in source.arrays
        )
        lines.append(f"arrays = {{ {', '.join(inputs)} }}")
    return lines


def treatment_lines(treatment: Treatment, share: float) -> list[str]:
    """Return the tables that say what is done to rows, and the lines for the end of [data]."""
    lines = []
    if share:
        lines += ["[split]", f"held_out = {share}", ""]
    scrub = treatment.scrub
    if scrub != NO_SCRUB:
        lines += ["[privacy]", f"scrub = [{', '.join(map(_quoted, scrub.kinds))}]"]
        if scrub.phone_region is not None:
            lines.append(f"phone_region = {_quoted(scrub.phone_region)}")
        if scrub.names_model is not None:
            lines.append(f"names_model = {_quoted(str(scrub.names_model))}")
        lines.append("")
    return lines


def policy_lines(treatment: Treatment) -> list[str]:
    """Return the lines of [data] that are no columns."""
    if treatment.unknown_labels is UnknownLabels.REFUSE:
        return []
    return [f'unknown_labels = "{treatment.unknown_labels}"']


def _quoted(text: str) -> str:
    """Return a TOML string: JSON's escapes are among TOML's, but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
