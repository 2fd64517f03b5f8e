"""Faults of what the coordinator keeps its memory and its artifacts in; nobody's input is wrong.

    FedloomError
    └── StorageFault      the database or the place of artifacts fails: `where`, `problem`
        └── StorageFull   it has no room left

Both are OSErrors too: whoever is ready for a disk that fails is ready for a server that does.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fedloom.errors import FedloomError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StorageFault(FedloomError, OSError):
    """The store, or the place of artifacts, does not do what is asked; later it may."""

    _errno = errno.EIO

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(self._errno, problem)
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class StorageFull(StorageFault):
    """Nothing more can be stored until there is room; what is stored can be read."""

    _errno = errno.ENOSPC


def is_full(error: OSError) -> bool:
    """Whether the error says that there is no room: on a disk, in a quota, in a database."""
    return error.errno in _FULL


@contextmanager
def faults_of(where: str) -> Iterator[None]:
    """Turn what the operating system says of a disk into a StorageFault; no file is no fault."""
    try:
        yield
    except (StorageFault, FileNotFoundError):
        raise
    except OSError as error:
        fault = StorageFull if is_full(error) else StorageFault
        raise fault(where, str(error.strerror or error)) from error
