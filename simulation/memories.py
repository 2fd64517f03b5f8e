"""What clients remember from round to round where the strategy asks for it: files, not memory.

A client's memory after a round is the newest that was proposed in it or before. A round that was
begun and never finished is conducted again and proposes the same again; what it left is not read.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies import Memory


class Memories:
    """`count` vectors (P,) of each client, in a folder; with a count of 0 nothing is kept.

    `own`: the last of them is the client's own model.
    """

    def __init__(self, folder: Path, count: int, size: int, own: bool = False) -> None:
        self._folder = folder
        self._count = count
        self._size = size
        self._own = own

    def read(self, client: str, after_round: int, theta: Theta) -> Memory:
        """Return what the client remembers after that round.

        Before its first one: zeros, and as its own model the `theta` (P,) that it meets.
        """
        if not self._count:
            return ()
        known = [number for number in self._rounds(client) if number <= after_round]
        if not known:
            zeros = tuple(np.zeros(self._size, np.float32) for _ in range(self._count - self._own))
            return (*zeros, theta) if self._own else zeros
        return tuple(np.fromfile(self._path(client, max(known)), "<f4").reshape(self._count, -1))

    def propose(self, client: str, in_round: int, memory: Memory) -> None:
        """Keep what the client is to remember if that round is finished, and what it had before."""
        if not self._count:
            return
        earlier = sorted(number for number in self._rounds(client) if number < in_round)
        path = self._path(client, in_round)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        np.stack(memory).astype("<f4", copy=False).tofile(partial)
        partial.replace(path)
        for older in earlier[:-1]:
            self._path(client, older).unlink()

    def forget(self, clients: Iterable[str], round_number: int) -> None:
        """Drop what was proposed in a round that is void, or that others were invited to again."""
        if self._count:
            for client in clients:
                self._path(client, round_number).unlink(missing_ok=True)

    def clients(self) -> list[str]:
        """Return who remembers something, in ascending order."""
        return sorted(path.name for path in self._folder.iterdir()) if self._count else []

    def _rounds(self, client: str) -> list[int]:
        return [int(path.stem) for path in (self._folder / client).glob("*.f32")]

    def _path(self, client: str, number: int) -> Path:
        return self._folder / client / f"{number}.f32"
