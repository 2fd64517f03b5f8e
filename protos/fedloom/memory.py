"""How much freed memory a process keeps."""

import contextlib
import ctypes

_M_ARENA_MAX = -8  # glibc, malloc.h
_ARENAS = 2


def limit_arenas() -> None:
    """Have all threads allocate from two heaps; call it before threads are started.

    glibc gives every thread a heap of its own, up to eight per core, and each keeps the megabytes
    that passed through it: gRPC moves a part through several threads. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """Return to the system the pages in which nothing lies; it takes milliseconds.

    gRPC sizes a connection's read buffers by what came last, so heaps grow with transfers, and
    glibc by itself gives back only a heap's end. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
