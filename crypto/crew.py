"""Who runs a step over chunks: the caller's thread, or several processes (`workers`).

A step turns an iterator of chunks, tuples that begin with the chunk's index, into an iterator with
one result for each. A crew runs one step over the chunks of several calls, and gives the results in
the order of the chunks. Chunks of the same index come to the same process: what a step keeps for a
chunk is there when the chunk comes again.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from .errors import InvalidContext

MAX_PROCESSES = 256

Chunk = TypeVar("Chunk", bound=tuple[Any, ...])
Result = TypeVar("Result")
_Chunk_contra = TypeVar("_Chunk_contra", bound=tuple[Any, ...], contravariant=True)
_Result_co = TypeVar("_Result_co", covariant=True)
Step = Callable[[Iterator[Chunk]], Iterator[Result]]


class Crew(Protocol[_Chunk_contra, _Result_co]):
    """Runs one step. It ends with `close`, or with this object."""

    def run(self, chunks: Iterable[_Chunk_contra]) -> Iterator[_Result_co]:
        """Yield one result for each chunk, in their order; one run at a time.

        Raises what the step raises, or WorkerLost; after that there is no other run.
        """

    def close(self) -> None:
        """End whatever runs the step, and wait until it has."""


def count_processes(asked: int, chunks: int) -> int:
    """Return how many processes to use for so many chunks; 0 asks for one for each core.

    Raises InvalidContext unless 0 .. 256 are asked for.
    """
    if not 0 <= asked <= MAX_PROCESSES:
        raise InvalidContext("processes", f"0 .. {MAX_PROCESSES}", asked)
    return max(1, min(asked or os.cpu_count() or 1, chunks))


def crew_of(step: Step[Chunk, Result], processes: int) -> Crew[Chunk, Result]:
    """Return who runs the step."""
    if processes == 1:
        return InProcess(step)
    from .workers import Workers  # with it comes the standard library's multiprocessing

    return Workers(step, processes)


def stepped(
    step: Step[Chunk, Result], chunks: Iterable[Chunk], processes: int
) -> Generator[Result, None, None]:
    """Run the step over the chunks once, and end its crew with the last of them, or by `close`."""
    crew = crew_of(step, processes)
    try:
        yield from crew.run(chunks)
    finally:
        crew.close()


class InProcess(Generic[Chunk, Result]):
    """See `Crew`: the step runs in the caller's thread."""

    def __init__(self, step: Step[Chunk, Result]) -> None:
        self._waiting: deque[Chunk] = deque()
        self._results = step(iter(self._waiting.popleft, None))

    def run(self, chunks: Iterable[Chunk]) -> Iterator[Result]:
        for chunk in chunks:
            self._waiting.append(chunk)
            yield next(self._results)

    def close(self) -> None:
        self._results = iter(())
