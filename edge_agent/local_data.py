"""Where this agent keeps what it has read of its data, and how it splits them."""

import secrets
from collections import Counter
from dataclasses import replace
from pathlib import Path

from edge_agent.config import AgentConfig
from edge_agent.data import DataSource, Part
from edge_agent.kept_examples import discard_kept, kept_report
from edge_agent.scrubbing import Scrubber
from fedloom.secret_files import write_secret

_SALT_FILE = "split.salt"
_SALT_BYTES = 32
_TRAIN, _HELD_OUT = "train", "held_out"


def on_this_device(home: Path, config: AgentConfig) -> AgentConfig:
    """Return the configuration with its sources split, and with folders to keep examples in.

    What was kept for a held-out source that is no more is deleted. Raises ConfigError where the
    owner wants personal data replaced that this device cannot find.
    """
    Scrubber(config.data.treatment.scrub, Counter())
    data, held_out = split_sources(home, config)
    if held_out is None:
        discard_kept(_folder(home, _HELD_OUT))
    return replace(
        config,
        data=_kept(data, _folder(home, _TRAIN)),
        held_out=held_out and _kept(held_out, _folder(home, _HELD_OUT)),
    )


def split_sources(home: Path, config: AgentConfig) -> tuple[DataSource, DataSource | None]:
    """Return what to train on and what is held out."""
    if not config.held_out_share:
        return config.data, config.held_out
    salt = _salt(home)
    train, held_out = (
        replace(
            config.data,
            treatment=replace(
                config.data.treatment, part=Part(salt, config.held_out_share, is_held_out)
            ),
        )
        for is_held_out in (False, True)
    )
    return train, held_out


def data_reports(home: Path) -> dict[str, dict[str, object]]:
    """Return what the last run's readings of the data have found, by what they were for."""
    reports = {name: kept_report(_folder(home, name)) for name in (_TRAIN, _HELD_OUT)}
    return {name: report for name, report in reports.items() if report is not None}


def _kept(source: DataSource, folder: Path) -> DataSource:
    return replace(source, treatment=replace(source.treatment, kept_in=folder))


def _folder(home: Path, name: str) -> Path:
    return home / "examples" / name


def _salt(home: Path) -> bytes:
    """Return this agent's salt, made at its first use: a new one would split the data anew."""
    path = home / _SALT_FILE
    try:
        salt = path.read_bytes()
    except FileNotFoundError:
        salt = b""
    if len(salt) != _SALT_BYTES:
        salt = secrets.token_bytes(_SALT_BYTES)
        write_secret(path, salt)
    return salt
