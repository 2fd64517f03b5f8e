"""NumPy archives, read a few rows at a time: an array need not fit into memory."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused

_BLOCK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 16
_KINDS = "biufUS"  # numbers and texts: nothing that would have to be unpickled

# What a damaged archive makes `zipfile` raise; RuntimeError: an encrypted one.
_ARCHIVE_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    ValueError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)


class _Member:
    """One array of the archive, whose first axis counts rows."""

    def __init__(self, stream: IO[bytes], name: str, file: str) -> None:
        self._stream = stream
        self._name = f"{name} in {file}"
        self.shape, self._type = self._header()
        self.row_bytes = self._type.itemsize * math.prod(self.shape[1:])

    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        try:
            version = npy.read_magic(self._stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, kind = read(self._stream, _MAX_HEADER_BYTES)
        except ValueError as error:
            raise self._refused("a NumPy array", "other content") from error
        if kind.kind not in _KINDS:
            raise self._refused("numbers or texts", f"type {kind}")
        if not shape or (fortran and len(shape) > 1):
            raise self._refused("rows one after the other (C order)", f"shape {shape}")
        if not kind.itemsize or 0 in shape[1:]:
            raise self._refused("rows of some length", f"type {kind}, shape {shape}")
        return shape, kind

    def rows(self, count: int) -> NDArray[Any]:
        """Return the next rows."""
        data = self._stream.read(count * self.row_bytes)
        if len(data) != count * self.row_bytes:
            raise self._refused(f"{self.shape[0]} rows", "fewer")
        return np.frombuffer(data, self._type).reshape(count, *self.shape[1:])

    def _refused(self, expected: str, found: str) -> Refused:
        return Refused(
            Reason.DATA_UNREADABLE, f"expected {expected} as {self._name}, found {found}"
        )


def npz_keys(path: Path) -> list[str]:
    """Return the names of an archive's arrays; raises Refused(DATA_UNREADABLE)."""
    with _opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _ARCHIVE_ERRORS as error:
        problem = getattr(error, "strerror", None) or "other or damaged content"
        raise Refused(
            Reason.DATA_UNREADABLE, f"expected a NumPy archive in {path.name}, found: {problem}"
        ) from error


def npz_rows(path: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one row of every named array at a time; raises Refused(DATA_UNREADABLE)."""
    with _opened(path) as archive:
        yield from _rows(archive, names, path.name)


def _rows(archive: zipfile.ZipFile, names: Sequence[str], file: str) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        members = {
            name: _Member(stack.enter_context(archive.open(f"{name}.npy")), name, file)
            for name in names
        }
        counts = {member.shape[0] for member in members.values()}
        if len(counts) != 1:
            raise Refused(
                Reason.DATA_UNREADABLE,
                f"expected arrays of as many rows in {file}, found {sorted(counts)}",
            )
        (left,) = counts
        widest = max(member.row_bytes for member in members.values())
        while left:
            count = min(left, max(1, _BLOCK_BYTES // widest))
            blocks = {name: member.rows(count) for name, member in members.items()}
            for index in range(count):
                yield {name: block[index] for name, block in blocks.items()}
            left -= count
