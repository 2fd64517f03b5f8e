"""Secrets on disk: files that only their owner can read, written whole or not at all."""

import os
from pathlib import Path


def write_secret(path: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` to `path` with mode 0600, replacing an older file at once."""
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk gets its room back
        raise


def delete_secret(path: Path) -> None:
    """Delete the file, and what a write that was cut has left of it."""
    path.unlink(missing_ok=True)
    _partial(path).unlink(missing_ok=True)


def make_private_folder(path: Path) -> None:
    """Create the folder, and those above it, with mode 0700 for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")
