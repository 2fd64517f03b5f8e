"""Turns at the event loop: a thousand agents that send at once must not hold up a heartbeat.

The loop goes through everything that is ready before it looks at anything new, and what is ready
lies in memory: a few hundred streams with parts of 256 KiB make that a second, and hundreds of
megabytes. So a few dozen transfers move at a time, and the others have not been told to begin.
Whoever is slow to send or to take a part loses its turn and goes on: nobody waits for it.
Messages of control streams are small and each handled at once: they come one in a pass.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

AT_A_TIME = 24
SLOW_SECONDS = 0.5
_T = TypeVar("_T")


class Turns:
    """Lets so many fast transfers move at a time, and any number of slow ones."""

    def __init__(self, at_a_time: int = AT_A_TIME) -> None:
        self._gate = asyncio.Semaphore(at_a_time)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator["Turn"]:
        """Wait for a turn, which ends with the block or earlier."""
        await self._gate.acquire()
        turn = Turn(self._gate)
        try:
            yield turn
        finally:
            turn.end()


class OneByOne:
    """A block that one caller enters in a pass of the event loop, however many are ready to.

    The others wait in line, and everything else that is ready comes between two of them.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        try:
            # A lock that is free again within the pass would hold nobody up.
            await asyncio.sleep(0)
        finally:
            self._lock.release()


class Turn:
    """One transfer's turn."""

    def __init__(self, gate: asyncio.Semaphore) -> None:
        self._gate: asyncio.Semaphore | None = gate

    async def take(self, step: Coroutine[Any, Any, _T]) -> _T:
        """Return the step's result, however long it takes; the turn ends when that is long."""
        if self._gate is None:
            return await step
        task = asyncio.create_task(step)
        try:
            done, _ = await asyncio.wait({task}, timeout=SLOW_SECONDS)
            if not done:
                self.end()
            return await task
        except asyncio.CancelledError:
            task.cancel()
            raise

    def end(self) -> None:
        """Let another transfer move."""
        if self._gate is not None:
            self._gate.release()
            self._gate = None
