"""A crew of processes: SEAL holds the interpreter's lock, so its threads would only wait.

    caller        (c, chunk) ──pipe──▶ worker c mod N
                  result     ◀──pipe── step

A worker has one chunk at a time, so that N chunks are in flight, however many there are.

A step travels with all that it knows, keys too: through a pipe, never by a file or a command line.
Workers are forked by a server process that has imported this package and done nothing else (where
there is none, each imports it anew): nothing may fork between making and using an object of SEAL.
They end when their pipe does, however the caller ends; a terminal's signals are the caller's.
"""

import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, Generic

from .crew import Chunk, Result, Step
from .errors import IllegalStep, WorkerLost

# Before 3.11.1 any user of the machine could speak to a server of forks (CVE-2022-42919).
_SERVER = "forkserver" in get_all_start_methods() and sys.version_info >= (3, 11, 1)
_METHOD = "forkserver" if _SERVER else "spawn"
_PRELOADED = ["crypto.sealed", "crypto.masked"]
_SECONDS_TO_END = 5.0  # a worker that got its last chunk needs 0.02
_starting = threading.Lock()


class Workers(Generic[Chunk, Result]):
    """See `Crew`: the step runs in each of several processes."""

    def __init__(self, step: Step[Chunk, Result], processes: int) -> None:
        self._connections: list[Connection[Any, Any]] = []
        self._processes: list[BaseProcess] = []
        self._running = False
        self._release = weakref.finalize(self, _close, self._connections)
        for _ in range(processes):
            self._start(step)

    def run(self, chunks: Iterable[Chunk]) -> Iterator[Result]:
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
        self._release()
        for process in self._processes:
            process.join(_SECONDS_TO_END)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _start(self, step: Step[Chunk, Result]) -> None:
        context = get_context(_METHOD)
        context.set_forkserver_preload(_PRELOADED)
        ours, theirs = context.Pipe()
        self._connections.append(ours)
        process: BaseProcess = context.Process(target=_serve, args=(theirs, step), daemon=True)  # type: ignore[attr-defined]
        try:
            with theirs, _without_main():
                process.start()
        except (EOFError, OSError) as error:
            raise WorkerLost("worker process", "to start", error) from error
        self._processes.append(process)

    def _send(self, worker: int, chunk: Chunk) -> None:
        try:
            _send(self._connections[worker], chunk)
        except OSError as error:
            raise self._lost(worker) from error

    def _receive(self, worker: int) -> Result:
        failure: Exception | None
        result: Result
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


def _send(connection: "Connection[Any, Any]", what: object) -> None:
    """Send as `connection.send` does, but for the copies that its older format makes of buffers."""
    connection.send_bytes(ForkingPickler.dumps(what, 5))


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


def _serve(connection: "Connection[Any, Any]", step: Step[Chunk, Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):  # the caller has ended, or needs no more
        try:
            for result in step(iter(connection.recv, None)):
                _send(connection, (None, result))
        except Exception as error:  # the top of a process: who has sent the chunk raises it
            _send(connection, (error, None))
