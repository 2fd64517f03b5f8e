"""`agent.toml`: the device's data and policy, as frozen values. Unknown keys are errors.

[data]
path = "train.csv"           # CSV, JSONL, Parquet, CoNLL text or .npz, or a folder; from this file
text = "text"                # names of columns, each for the tasks that need it
label = "label"
words = "words"              # lists, or texts with blanks between words
tags = "tags"
prompt = "Q: {question}"     # in place of the plan's template; {COLUMN} stands for a row's value
answer = "{reply}"
arrays = { window = ["x0..x99"], age = ["age"] }   # columns, by the names of the plan's inputs
unknown_labels = "refuse"    # or "skip": rows whose label the plan does not know

[held_out]                   # optional: quality is measured on it after every round
path = "test.csv"            # and columns as above

[split]                      # optional, in place of [held_out]
held_out = 0.1               # share of the rows of [data], chosen by their content

[privacy]
scrub = ["email", "phone", "card", "iban", "names"]   # replaced before texts are tokenised
phone_region = "DE"          # where numbers without +49 or the like belong; else they stay
names_model = "ner"          # folder of an exported model that tags names of persons

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
from edge_agent.data_config import (
    DATA_KEYS,
    policy_lines,
    read_held_out_share,
    read_sources,
    source_lines,
    treatment_lines,
)
from edge_agent.model_versions import DEFAULT_KEPT, MAX_KEPT
from fedloom.errors import ConfigError
from fedloom.terms import Protection, Release

CONFIG_FILE = "agent.toml"
_E = TypeVar("_E", bound=Enum)
_KEYS = {
    **DATA_KEYS,
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
    held_out_share: float = 0.0  # of `data`, where `held_out` is None
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
    data, held_out = read_sources(path, table)
    policy = table.get("policy", {})
    return AgentConfig(
        data,
        held_out,
        _named(path, policy, "minimum_protection", Protection.SEALED),
        _named(path, policy, "release", Release.AGENTS),
        _count(path, table, "threads", 0, 1024),
        _count(path, table, "crypto_processes", 1, MAX_PROCESSES),
        held_out_share=read_held_out_share(path, table),
        kept_models=_kept_models(path, table),
    )


def write_agent_config(home: Path, config: AgentConfig) -> None:
    """Write a first `agent.toml`."""
    treatment = config.data.treatment
    lines = ["[data]", *source_lines(config.data), *policy_lines(treatment), ""]
    if config.held_out is not None:
        lines += ["[held_out]", *source_lines(config.held_out), ""]
    lines += treatment_lines(treatment, config.held_out_share)
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
