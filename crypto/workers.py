"""One step on several cores: SEAL holds the interpreter's lock, so its threads would only wait.

    caller        (c, chunk) ──pipe──▶ worker c mod N
                  result     ◀──pipe── step

A step turns an iterator of chunks, tuples that begin with the chunk's index, into an iterator with
one result for each. With N = 1 it runs here, else in N processes, each of which sees the chunks
whose index is the same modulo N: what a step keeps for a chunk is there when the chunk comes again.
A worker has one chunk at a time, so that N chunks are in flight, however many there are, and
results come in the order of the chunks.

A step travels with all that it knows, keys too: through a pipe, never by a file or a command line.
Workers are forked by a server process that has imported this package and done nothing else (where
there is none, each imports it anew): nothing may fork between making and using an object of SEAL.
They end when their pipe does, however the caller ends; a terminal's signals are the caller's.
"""

import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, Generic, TypeVar

from .errors import IllegalStep, InvalidContext, WorkerLost

MAX_PROCESSES = 256

_Chunk = TypeVar("_Chunk", bound=tuple[Any, ...])
_Result = TypeVar("_Result")
Step = Callable[[Iterator[_Chunk]], Iterator[_Result]]

_METHOD = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
_PRELOADED = ["crypto.sealed", "crypto.masked"]
_SECONDS_TO_END = 5.0  # a worker that got its last chunk needs 0.02
_starting = threading.Lock()


def count_processes(asked: int, chunks: int) -> int:
    """Return how many processes to use for so many chunks; 0 asks for one for each core.

    Raises InvalidContext unless 0 .. 256 are asked for.
    """
    if not 0 <= asked <= MAX_PROCESSES:
        raise InvalidContext("processes", f"0 .. {MAX_PROCESSES}", asked)
    return max(1, min(asked or os.cpu_count() or 1, chunks))


class InProcess(Generic[_Chunk, _Result]):
    """Runs the step in the caller's thread."""

    def __init__(self, step: Step[_Chunk, _Result]) -> None:
        self._waiting: deque[_Chunk] = deque()
        self._results = step(iter(self._waiting.popleft, None))

    def run(self, chunks: Iterable[_Chunk]) -> Iterator[_Result]:
        """Yield one result for each chunk, in their order."""
        for chunk in chunks:
            self._waiting.append(chunk)
            yield next(self._results)

    def close(self) -> None:
        """Take no more chunks."""
        self._results = iter(())


class Workers(Generic[_Chunk, _Result]):
    """Runs the step in several processes, which end with `close` or with this object."""

    def __init__(self, step: Step[_Chunk, _Result], processes: int) -> None:
        self._connections: list[Connection[Any, Any]] = []
        self._processes: list[BaseProcess] = []
        self._running = False
        self._release = weakref.finalize(self, _close, self._connections)
        for _ in range(processes):
            self._start(step)

    def run(self, chunks: Iterable[_Chunk]) -> Iterator[_Result]:
        """Yield one result for each chunk, in their order; one run at a time."""
        if self._running:
            raise IllegalStep("runs of one crew of workers", "one at a time", "two")
        self._running = True
        busy: deque[int] = deque()  # workers, in the order of their chunks
        try:
            for chunk in chunks:
                worker = chunk[0] % len(self._connections)
                done = []
                while worker in busy:
                    done.append(self._receive(busy.popleft()))
                self._send(worker, chunk)
                busy.append(worker)
                yield from done  # only now: the worker works while the caller does
            while busy:
                yield self._receive(busy.popleft())
        except GeneratorExit:
            self._drain(busy)
            raise
        except BaseException:
            self._release()  # half a result may have been read: no run can follow
            raise
        finally:
            self._running = False

    def close(self) -> None:
        """End the workers, and wait until they have."""
        self._release()
        for process in self._processes:
            process.join(_SECONDS_TO_END)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _start(self, step: Step[_Chunk, _Result]) -> None:
        context = get_context(_METHOD)
        context.set_forkserver_preload(_PRELOADED)
        ours, theirs = context.Pipe()
        self._connections.append(ours)
        process: BaseProcess = context.Process(target=_serve, args=(theirs, step), daemon=True)  # type: ignore[attr-defined]
        with theirs, _without_main():
            process.start()
        self._processes.append(process)

    def _send(self, worker: int, chunk: _Chunk) -> None:
        try:
            self._connections[worker].send(chunk)
        except OSError as error:
            raise self._lost(worker) from error

    def _receive(self, worker: int) -> _Result:
        failure: Exception | None
        result: _Result
        try:
            failure, result = self._connections[worker].recv()
        except (EOFError, OSError) as error:
            raise self._lost(worker) from error
        if failure is not None:
            raise failure
        return result

    def _drain(self, busy: Iterable[int]) -> None:
        """Take what nobody wants any more, so that the next run meets its own results."""
        for worker in busy:
            with suppress(EOFError, OSError):
                self._connections[worker].recv()

    def _lost(self, worker: int) -> WorkerLost:
        process = self._processes[worker]
        process.join(_SECONDS_TO_END)
        return WorkerLost("worker process", "its result", f"its end, exit code {process.exitcode}")


Crew = InProcess[_Chunk, _Result] | Workers[_Chunk, _Result]


def crew_of(step: Step[_Chunk, _Result], processes: int) -> Crew[_Chunk, _Result]:
    """Return who runs the step over the chunks of several calls."""
    return InProcess(step) if processes == 1 else Workers(step, processes)


def stepped(
    step: Step[_Chunk, _Result], chunks: Iterable[_Chunk], processes: int
) -> Generator[_Result, None, None]:
    """Run the step over the chunks once. Raises what it raises, or WorkerLost."""
    crew = crew_of(step, processes)
    try:
        yield from crew.run(chunks)
    finally:
        crew.close()


def _close(connections: list["Connection[Any, Any]"]) -> None:
    for connection in connections:
        connection.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not run the caller's main module again: they need nothing of it.

    That would cost more than most updates do, and a script without a guard would start itself.
    """
    with _starting:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _serve(connection: "Connection[Any, Any]", step: Step[_Chunk, _Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):  # the caller has ended, or needs no more
        try:
            for result in step(iter(connection.recv, None)):
                connection.send((None, result))
        except Exception as error:  # the top of a process: who has sent the chunk raises it
            connection.send((error, None))
