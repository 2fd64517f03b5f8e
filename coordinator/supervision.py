"""How the process begins and ends: what systemd is told, and what a shutdown waits for."""

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


class Supervisor:
    """Speaks sd_notify(3) to the socket that systemd names; without one it says nothing."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._watchdog_seconds = int(environment.get("WATCHDOG_USEC", "0")) / 1e6

    def tell(self, state: str) -> None:
        """Send `READY=1`, `STOPPING=1` or the like."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a supervisor that hangs must not take us with it
            try:
                sender.sendto(state.encode(), address)
            except OSError:
                return  # nobody listens any more, or not now: the next word says the same

    async def watch(self) -> None:
        """Feed the watchdog for ever: from the event loop, so that one that hangs is restarted."""
        while self._watchdog_seconds:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_seconds / 3)


class Unfinished:
    """Work that is brought to its end when its caller is cut off; a shutdown waits for it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references

    async def finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Return what the work returns; a caller that is cancelled leaves it running."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def settled(self, seconds: float) -> bool:
        """Wait until nothing is left, at most so long; return whether nothing is."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        return not self._tasks


async def first_signal() -> None:
    """Wait for SIGINT or SIGTERM; the next one ends the process at once, whatever it does."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, came.set)
    try:
        await came.wait()
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            # The kernel's own action: it works even while the event loop hangs.
            signal.signal(number, signal.SIG_DFL)
