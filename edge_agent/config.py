"""`agent.toml`: the device's data and policy, as frozen values. Unknown keys are errors.

[data]
path = "train.csv"           # CSV, JSONL or Parquet; relative to this file
text = "text"                # column names
label = "label"

[held_out]                   # optional: quality is measured on it after every round
path = "test.csv"

[policy]
minimum_protection = "sealed"      # runs with less are declined
release = "agents"                 # or "coordinator": who may get the opened sums

[engine]
threads = 0                  # to train with; 0: as many as the device has cores
crypto_processes = 1         # to encrypt in; 1: the agent's own, 0: one for each core

[models]
keep = 5                     # newest versions of each adapter, and last ones of as many runs
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from crypto import MAX_PROCESSES
from edge_agent.data import DataSource
from edge_agent.model_versions import DEFAULT_KEPT, MAX_KEPT
from fedloom.errors import ConfigError
from fedloom.terms import Protection, Release

CONFIG_FILE = "agent.toml"
_E = TypeVar("_E", bound=Enum)
_KEYS = {
    "data": {"path", "text", "label"},
    "held_out": {"path", "text", "label"},
    "policy": {"minimum_protection", "release"},
    "engine": {"threads", "crypto_processes"},
    "models": {"keep"},
}


@dataclass(frozen=True)
class AgentConfig:
    """What this device trains on, and what it agrees to."""

    data: DataSource
    held_out: DataSource | None = None
    minimum_protection: Protection = Protection.SEALED
    permitted_release: Release = Release.AGENTS
    threads: int = 0
    crypto_processes: int = 1
    kept_models: int = DEFAULT_KEPT


def load_agent_config(home: Path) -> AgentConfig:
    """Read `agent.toml`; raises ConfigError that names the wrong key."""
    path = home / CONFIG_FILE
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be read: join first, with --data ({error.strerror})"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not TOML: {error}") from error
    for section, values in table.items():
        if section not in _KEYS or not isinstance(values, dict):
            raise ConfigError(str(path), f"[{section}]: expected one of {sorted(_KEYS)}")
        for key in values:
            if key not in _KEYS[section]:
                expected = sorted(_KEYS[section])
                raise ConfigError(str(path), f"{section}.{key}: expected one of {expected}")
    data = _source(path, table, "data")
    if data is None:
        raise ConfigError(str(path), "data.path: expected the file to train on")
    policy = table.get("policy", {})
    return AgentConfig(
        data,
        _source(path, table, "held_out"),
        _named(path, policy, "minimum_protection", Protection.SEALED),
        _named(path, policy, "release", Release.AGENTS),
        _count(path, table, "threads", 0, 1024),
        _count(path, table, "crypto_processes", 1, MAX_PROCESSES),
        kept_models=_kept_models(path, table),
    )


def write_agent_config(home: Path, config: AgentConfig) -> None:
    """Write a first `agent.toml`."""
    lines = ["[data]", *_source_lines(config.data), ""]
    if config.held_out is not None:
        lines += ["[held_out]", *_source_lines(config.held_out), ""]
    lines += [
        "[policy]",
        f'minimum_protection = "{config.minimum_protection.name.lower()}"',
        f'release = "{config.permitted_release.name.lower()}"',
        "",
        "[engine]",
        f"threads = {config.threads}",
        f"crypto_processes = {config.crypto_processes}",
        "",
        "[models]",
        f"keep = {config.kept_models}",
        "",
    ]
    (home / CONFIG_FILE).write_text("\n".join(lines))


def _source_lines(source: DataSource) -> list[str]:
    return [
        f"path = {_quoted(str(source.path))}",
        f"text = {_quoted(source.text)}",
        f"label = {_quoted(source.label)}",
    ]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _source(path: Path, table: Mapping[str, Any], section: str) -> DataSource | None:
    values = table.get(section, {})
    if "path" not in values:
        return None
    for key, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(str(path), f"{section}.{key}: expected text, found {value!r}")
    return DataSource(
        (path.parent / values["path"]).resolve(),
        values.get("text", "text"),
        values.get("label", "label"),
    )


def _named(path: Path, policy: Mapping[str, Any], key: str, default: _E) -> _E:
    """Return the member of the default's enum that the policy names."""
    names = {member.name.lower(): member for member in type(default)}
    name = policy.get(key, default.name.lower())
    if not isinstance(name, str) or name not in names:
        raise ConfigError(
            str(path), f"policy.{key}: expected one of {sorted(names)}, found {name!r}"
        )
    return names[name]


def _count(path: Path, table: Mapping[str, Any], key: str, default: int, most: int) -> int:
    found = table.get("engine", {}).get(key, default)
    if type(found) is not int or not 0 <= found <= most:
        raise ConfigError(str(path), f"engine.{key}: expected 0..{most}, found {found!r}")
    return found


def _kept_models(path: Path, table: Mapping[str, Any]) -> int:
    found = table.get("models", {}).get("keep", DEFAULT_KEPT)
    if type(found) is not int or not 1 <= found <= MAX_KEPT:
        raise ConfigError(str(path), f"models.keep: expected 1..{MAX_KEPT}, found {found!r}")
    return found
