"""Turns at the event loop: a thousand agents that send at once must not hold up a heartbeat.

The loop goes through everything that is ready before it looks at anything new. A few hundred parts
of 256 KiB make that a second; with turns it is a few dozen parts, and the control streams come in
between. Whoever is slow to send or to take a part loses its turn, and nobody waits for it.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

AT_A_TIME = 16
TURN_SECONDS = 0.25
_T = TypeVar("_T")


class Turns:
    """Lets so many transfers at a time move a part."""

    def __init__(self, at_a_time: int = AT_A_TIME) -> None:
        self._gate = asyncio.Semaphore(at_a_time)

    async def take(self, step: Coroutine[Any, Any, _T]) -> _T:
        """Begin the step in turn and return its result, however long that takes."""
        task: asyncio.Task[_T] | None = None
        try:
            async with self._gate:
                task = asyncio.create_task(step)
                await asyncio.wait({task}, timeout=TURN_SECONDS)
            return await task
        except asyncio.CancelledError:
            if task is None:
                step.close()
            else:
                task.cancel()
            raise
