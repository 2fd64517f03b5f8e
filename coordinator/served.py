"""What an operator's thread may ask of the process that serves agents, and have it do."""

import asyncio

from coordinator.conductor import Conductor
from coordinator.run_state import RunState
from coordinator.sessions import Sessions
from fedloom.errors import Reason, Refused


class Served:
    """The open run and the agents that are here; everything that is returned never changes."""

    def __init__(
        self, conductor: Conductor, sessions: Sessions, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._conductor = conductor
        self._sessions = sessions
        self._loop = loop  # where runs move, one event at a time

    def state_of(self, run_id: bytes) -> RunState | None:
        """Return the run's state while it is executed."""
        return self._conductor.state_of(run_id)

    def open_run(self) -> bytes | None:
        """Return the id of the run that is executed."""
        return self._conductor.open_run()

    def connected(self) -> frozenset[str]:
        """Return the agents whose control streams are open."""
        return frozenset(session.agent_id for session in self._sessions)

    def remove(self, agent_id: str, reason: str) -> None:
        """Send a banned agent away, soon, and go on without it."""
        refused = Refused(Reason.BANNED, reason)
        self._loop.call_soon_threadsafe(self._conductor.remove, agent_id, refused)
