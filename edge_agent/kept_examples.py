"""Examples in files of the agent's folder: mapped into memory, never held there as a whole.

A folder for each source: one file for each array, its rows one after the other, and `kept.json`,
which says what they were made from (`key`) and their digest. It is made beside its place and moved
there when it is whole. The folder has mode 0700: it holds what this device's data say.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused
from fedloom.secret_files import make_private_folder, write_secret

KEPT_FILE = "kept.json"
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL
Block = Mapping[str, NDArray[Any]]  # some rows of every array, by the array's name
Arrays = dict[str, NDArray[Any]]
_log = structlog.get_logger()


@dataclass(frozen=True)
class Kept:
    """What a folder holds: its arrays, what they were made from, their digest, and the report."""

    arrays: Arrays
    key: str
    sha256: str
    report: dict[str, object]


def read_kept(folder: Path) -> Kept | None:
    """Return what the folder holds; None where that is nothing, or not whole."""
    try:
        about = json.loads((folder / KEPT_FILE).read_text())
        arrays = {}
        for name, (kind, shape) in about["arrays"].items():
            with (folder / name).open("rb") as file:
                arrays[name] = _mapped(file, np.dtype(kind), tuple(shape))
        return Kept(arrays, str(about["key"]), str(about["sha256"]), dict(about["report"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("kept examples ignored", problem=type(error).__name__)
        return None


def kept_report(folder: Path) -> dict[str, object] | None:
    """Return what the reading found whose outcome the folder holds."""
    try:
        report = json.loads((folder / KEPT_FILE).read_text())["report"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if isinstance(report, dict) else None


def discard_kept(folder: Path) -> None:
    """Delete the folder and what a process that was killed left beside it."""
    for path in (folder, *folder.parent.glob(f".{folder.name}-*")):
        shutil.rmtree(path, ignore_errors=True)


class ExampleFiles:
    """The arrays of examples while they are written, in files without a name or in a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._open_files = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def write(self, blocks: Iterable[Block]) -> Arrays:
        """Append every block; return the arrays as they were written, mapped into memory."""
        try:
            with self._open_files:
                for block in blocks:
                    for name, rows in block.items():
                        self._append(name, rows)
                return {
                    name: _mapped(file, *self._shapes[name]) for name, file in self._files.items()
                }
        except OSError as error:
            raise _no_room(error) from error

    def _append(self, name: str, rows: NDArray[Any]) -> None:
        file = self._files.get(name) or self._open(name)
        kind, shape = self._shapes.get(name, (rows.dtype.newbyteorder("<"), (0, *rows.shape[1:])))
        file.write(np.ascontiguousarray(rows, kind).reshape(-1).view(np.uint8).data)
        self._shapes[name] = (kind, (shape[0] + len(rows), *shape[1:]))

    def _open(self, name: str) -> BinaryIO:
        file: BinaryIO
        if self._folder is None:
            nameless = tempfile.TemporaryFile()  # noqa: SIM115 - it is entered at once
            file = cast(BinaryIO, self._open_files.enter_context(nameless))
        else:
            descriptor = os.open(self._folder / name, _NEW_FILE, 0o600)
            file = self._open_files.enter_context(os.fdopen(descriptor, "w+b"))
        self._files[name] = file
        return file

    def keep(self, key: str, sha256: bytes, report: Mapping[str, object]) -> None:
        """Write down what the files are: from now on they are whole."""
        if self._folder is None:
            return
        arrays = {name: (kind.str, shape) for name, (kind, shape) in self._shapes.items()}
        about = {"key": key, "sha256": sha256.hex(), "arrays": arrays, "report": report}
        try:
            write_secret(self._folder / KEPT_FILE, json.dumps(about).encode())
        except OSError as error:  # the data are read again next time
            _log.warning("examples not kept", problem=error.strerror)


@contextmanager
def replacing(folder: Path | None) -> Iterator[ExampleFiles]:
    """Give files to write that take the folder's place at the end, or vanish with an error."""
    if folder is None:
        yield ExampleFiles(None)
        return
    try:
        make_private_folder(folder.parent)
        discard_kept(folder)  # first: the room of both might not be there
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _no_room(error) from error
    try:
        yield ExampleFiles(made)
        _move(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move(made: Path, folder: Path) -> None:
    try:
        made.replace(folder)
    except OSError as error:  # what is mapped stays, and the data are read again next time
        _log.warning("examples not kept", problem=error.strerror)


def _no_room(error: OSError) -> Refused:
    return Refused(
        Reason.DATA_UNREADABLE,
        f"expected room for what is read of the data, found: {error.strerror}",
    )


def _mapped(file: BinaryIO, kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Map a whole file, which may be closed then; raises ValueError when its size is another."""
    file.flush()
    size = os.fstat(file.fileno()).st_size
    if size != kind.itemsize * math.prod(shape):
        raise ValueError("another size")
    return np.asarray(np.memmap(file, kind, "r", shape=shape))
