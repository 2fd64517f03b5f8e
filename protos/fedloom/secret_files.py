"""Secrets on disk: files that only their owner can read, written whole or not at all."""

import os
from pathlib import Path


def write_secret(path: Path, secret: bytes) -> None:
    """Write `secret` to `path` with mode 0600, replacing an older file at once."""
    partial = path.with_name(path.name + ".part")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def make_private_folder(path: Path) -> None:
    """Create the folder, and those above it, with mode 0700 for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
