"""The folder of a search: one process at a time, one search, and no half line in its study."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError

STUDY_FILE = "study.jsonl"
_IDENTITY, _LOCK = "search.json", "search.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have the folder to oneself; raises ConfigError where another search is at work in it."""
    import fcntl  # not on every system

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                str(folder), "expected no other search at work in this folder, found one"
            ) from error
        # A process that was killed while it wrote left this: Optuna would wait for half a minute.
        (folder / f"{STUDY_FILE}.lock").unlink(missing_ok=True)
        yield


def require_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Keep what a search follows from; raises ConfigError where the folder has another's."""
    path = folder / _IDENTITY
    stated = json.loads(json.dumps(identity, sort_keys=True))
    if path.exists() and json.loads(path.read_text()) != stated:
        raise ConfigError(
            str(path.parent),
            "expected a new folder or one of the same search (run, space, data, clients, metric, "
            "pruner and seed), found another's",
        )
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(stated, sort_keys=True) + "\n")
    partial.replace(path)


def whole_lines(path: Path) -> Path:
    """Cut off a line that was not written to its end; return the path."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return path
