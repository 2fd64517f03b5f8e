"""When this device is not connected: outside its owner's hours, and while it is not needed."""

import asyncio
import contextlib

import structlog

from edge_agent.availability import Availability, local_now
from edge_agent.status import Link, StatusFile

LOOK_SECONDS = 60.0  # how often the owner's hours and the power are looked at
BUSY_LOOK_SECONDS = 1.0  # the same while something is to be done before leaving
MOST_AWAY_SECONDS = 86_400.0  # no coordinator sends this device away for longer
MOST_SPREAD_SECONDS = 3600.0  # nor has it wait longer before it tries again after a cut
FIRST_OPENING_SECONDS = 900.0  # over which devices with the same hours come that know no fleet
OPENING_SECONDS = 60.0  # the same at least, where the coordinator has said how it is paced
_log = structlog.get_logger()


class Absence:
    """What the owner and the coordinator say of when to be away."""

    def __init__(self, availability: Availability, status: StatusFile) -> None:
        self._availability = availability
        self._status = status
        self._asked = asyncio.Event()
        self._last_seconds = 0.0  # that was asked for: a measure of how large the fleet is
        self._knows_fleet = False
        self.seconds = 0.0  # that the coordinator asks for now; 0: stay
        self.spread_seconds = 0.0  # over which a fleet that was cut comes back

    @property
    def longest_pause(self) -> float:
        """Return how far pauses between tries may grow, in seconds."""
        return min(self._last_seconds, MOST_SPREAD_SECONDS)

    def told(self, come_back_seconds: int, spread_seconds: int) -> None:
        """Remember what the coordinator said, within this device's bounds."""
        self._knows_fleet = True
        self.spread_seconds = min(float(spread_seconds), MOST_SPREAD_SECONDS)
        self.seconds = min(float(come_back_seconds), MOST_AWAY_SECONDS)
        if self.seconds:
            self._last_seconds = self.seconds
            self._asked.set()

    def needed(self) -> None:
        """Forget that the device was to leave: something is asked of it, or it came back."""
        self.seconds = 0.0

    def why_not_now(self) -> str:
        """Return why the owner lets this device take no part now; "" if it may."""
        return self._availability.why_not(local_now())

    async def look_again(self) -> None:
        """Wait until it is time to ask again whether to leave."""
        wait = BUSY_LOOK_SECONDS if self.seconds else LOOK_SECONDS
        self._asked.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._asked.wait(), wait)

    async def until_available(self) -> None:
        """Wait until the owner's hours and the power let this device take part."""
        hours, was_closed = self._availability, False
        while why := self.why_not_now():
            was_closed = True
            self._status.link(Link.AWAY, why)
            await asyncio.sleep(min(max(1.0, hours.opens_in(local_now())), LOOK_SECONDS))
        if was_closed:
            least = OPENING_SECONDS if self._knows_fleet else FIRST_OPENING_SECONDS
            spread = max(least, self._last_seconds)
            await asyncio.sleep(hours.opening_delay(local_now(), spread))

    async def pass_by(self, seconds: float) -> None:
        """Be away as the coordinator asked."""
        if seconds:
            _log.info("away", seconds=seconds)
            self._status.link(Link.AWAY, f"asked to come back in {seconds:.0f} s")
            await asyncio.sleep(seconds)
