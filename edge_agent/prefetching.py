"""Work ahead of a reader in one thread, so that an accelerator does not wait for its next input."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar, cast

_T = TypeVar("_T")
_AHEAD = 2  # items that wait: one would be enough if all took the same time
_END = object()


def prefetched(items: Iterator[_T]) -> Generator[_T, None, None]:
    """Yield the items of an iterator that advances in another thread.

    What the iterator raises is raised here, after the items before it. Closing the generator ends
    the thread before it returns.
    """
    waiting: queue.Queue[object] = queue.Queue(_AHEAD)
    stopped = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for item in items:
                waiting.put(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # raised again in the reader's thread
            failures.append(error)
        waiting.put(_END)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _END:
            yield cast(_T, item)
        if failures:
            raise failures[0]
    finally:
        stopped.set()
        while thread.is_alive():
            _drain(waiting)
            thread.join(0.01)


def _drain(waiting: queue.Queue[object]) -> None:
    while not waiting.empty():
        waiting.get()
