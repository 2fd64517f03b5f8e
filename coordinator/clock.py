"""Time as runs see it: seconds since 1970 that never jump while the process lives."""

import time


class Clock:
    """Starts at the wall clock's time and moves with the steady clock."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        return self._offset + time.monotonic()
