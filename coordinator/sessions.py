"""Who is connected: one session per agent, with a queue of what it shall be told."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coordinator.selection import UNKNOWN, Traits
from fedloom.errors import Reason, Refused
from fedloom.terms import Protection
from fedloom.v1 import control_pb2

MAX_QUEUED_MESSAGES = 256  # an agent that does not read is not worth more memory


@dataclass(eq=False)
class Session:
    """One agent's control stream."""

    agent_id: str
    protections: frozenset[Protection]
    exchange_key: control_pb2.ExchangeKey | None  # carried from agent to agent, never used here
    unfinished_run_ids: tuple[bytes, ...] = ()  # runs that the agent has not heard the end of
    traits: Traits = UNKNOWN  # what it says of itself
    outbox: asyncio.Queue[control_pb2.ConnectResponse | Refused] = field(
        default_factory=lambda: asyncio.Queue(MAX_QUEUED_MESSAGES)
    )
    lost: bool = False  # it has not read what it was told

    def send(self, message: control_pb2.ConnectResponse | Refused) -> None:
        """Queue a message, or a refusal that ends the stream; an agent that lags is cut off."""
        if self.outbox.full():
            while not self.outbox.empty():
                self.outbox.get_nowait()
            self.lost = True
            message = Refused(Reason.INTERNAL, f"{MAX_QUEUED_MESSAGES} messages were not read")
        self.outbox.put_nowait(message)

    def can(self, protection: Protection) -> bool:
        """Whether the agent is able to take part under this protection."""
        keyed = protection is Protection.PLAIN or self.exchange_key is not None
        return protection in self.protections and keyed


class Sessions:
    """All connected agents."""

    def __init__(self) -> None:
        self._by_agent: dict[str, Session] = {}
        self.on_open: Callable[[Session], None] = lambda session: None
        self.on_close: Callable[[Session], None] = lambda session: None

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_agent.values()))

    def get(self, agent_id: str) -> Session | None:
        """Return the agent's open session."""
        return self._by_agent.get(agent_id)

    def open(self, session: Session) -> None:
        """Admit an agent; an older stream of the same agent is told that it is superseded."""
        older = self._by_agent.get(session.agent_id)
        if older is not None:
            older.send(Refused(Reason.SUPERSEDED, "the agent opened a newer control stream"))
            self.on_close(older)
        self._by_agent[session.agent_id] = session
        try:
            self.on_open(session)
        except BaseException:
            self.close(session)  # its call ends, and nobody else would
            raise

    def close(self, session: Session) -> None:
        """Forget the session unless a newer one has taken its place."""
        if self._by_agent.get(session.agent_id) is session:
            del self._by_agent[session.agent_id]
            self.on_close(session)

    def send(self, agent_id: str, message: control_pb2.ConnectResponse) -> None:
        """Tell an agent; one that is gone will ask again when it comes back."""
        if (session := self._by_agent.get(agent_id)) is not None:
            session.send(message)
            if session.lost:
                # Its call may be blocked in a write for as long as its connection lives. Later: the
                # run that says this is in the middle of a step.
                asyncio.get_running_loop().call_soon(self.close, session)
