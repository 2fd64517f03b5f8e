"""A bad network between real processes: a TCP proxy on loopback that delays, chokes and cuts.

TCP hides loss from those above it: what they see of it are stalls and resets, so those are what the
proxy makes. A direction that is frozen carries nothing, neither bytes nor the end of a connection.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

SEGMENT_BYTES = 1400  # forwarded at once: a slow link carries a large write bit by bit
BUFFERED_SEGMENTS = 1024  # what waits for a slow link, in the agent's kernel and its modem
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class Link:
    """What the network does now; a test changes it as it goes."""

    latency: float = 0.0  # seconds, one way
    bytes_per_second: float = float("inf")
    stall_share: float = 0.0  # of the segments: lost, and sent again `stall_seconds` later
    stall_seconds: float = 0.2  # the shortest retransmission timeout of Linux
    reset_after: Callable[[], int | None] = lambda: None  # bytes up that a connection lives for
    seed: int = 0
    up: asyncio.Event = field(default_factory=_set_event)  # cleared: frozen
    down: asyncio.Event = field(default_factory=_set_event)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311 - weather, not secrets

    def freeze(self, *, up: bool = True, down: bool = True) -> None:
        """Carry nothing from now on, in one direction or both; nobody is told."""
        for frozen, event in ((up, self.up), (down, self.down)):
            if frozen:
                event.clear()

    def thaw(self) -> None:
        """Carry again, first what was held back."""
        self.up.set()
        self.down.set()


@dataclass(eq=False)
class Connection:
    """An agent's connection, and the proxy's to the coordinator that goes with it."""

    link: Link
    agent: asyncio.StreamWriter
    coordinator: asyncio.StreamWriter
    up_bytes: int = 0  # that reached the coordinator
    agent_gone: bool = False  # the agent has closed its side
    coordinator_gone: bool = False

    def reset(self) -> None:
        """Break both sides at once."""
        _reset(self.agent)
        _reset(self.coordinator)


class Proxy:
    """Listens for agents, forwards to the coordinator's port, and counts."""

    def __init__(self, target: int, link: Link) -> None:
        self.link = link
        self.port = 0
        self.connections: list[Connection] = []  # all there ever were
        self._target = target
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where agents find the coordinator."""
        return f"127.0.0.1:{self.port}"

    @property
    def up_bytes(self) -> int:
        """All bytes that reached the coordinator: payload, and TLS and HTTP/2 around it."""
        return sum(connection.up_bytes for connection in self.connections)

    def abandon(self, *, up: bool = True, down: bool = True) -> None:
        """Make the connections that there are half-open for good; new ones get through."""
        for connection in self.connections:
            connection.link = Link()
            connection.link.freeze(up=up, down=down)

    def rebind(self) -> None:
        """Give the agent a new address: its connections break, the coordinator hears nothing.

        The next connection comes from another port, as behind a NAT.
        """
        self.abandon()
        for connection in self.connections:
            _reset(connection.agent)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until both its sides are gone."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        with contextlib.suppress(asyncio.CancelledError):  # by `close`
            await self.link.up.wait()  # a frozen link lets no handshake through either
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            except OSError:
                _reset(writer)  # nobody listens there: the agent hears that
                return
            connection = Connection(self.link, writer, far_writer)
            self.connections.append(connection)
            await asyncio.gather(_up(connection, reader), _down(connection, far_reader))

    async def close(self) -> None:
        """Break everything."""
        for connection in self.connections:
            connection.reset()
        for task in tuple(self._serving):
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)


@asynccontextmanager
async def proxy(target: int, link: Link) -> AsyncIterator[Proxy]:
    """Run a proxy in front of the coordinator's port."""
    found = Proxy(target, link)
    server = await asyncio.start_server(found.serve, "127.0.0.1")
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        await found.close()


async def _up(connection: Connection, reader: asyncio.StreamReader) -> None:
    def arrived(count: int) -> None:
        connection.up_bytes += count

    breaks_after = connection.link.reset_after()
    await _carry(connection, reader, connection.coordinator, True, arrived, breaks_after)
    connection.agent_gone = True
    await connection.link.up.wait()
    _reset(connection.coordinator)


async def _down(connection: Connection, reader: asyncio.StreamReader) -> None:
    await _carry(connection, reader, connection.agent, False, lambda count: None, None)
    connection.coordinator_gone = True
    await connection.link.down.wait()
    _reset(connection.agent)


async def _carry(
    connection: Connection,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    up: bool,
    arrived: Callable[[int], None],
    breaks_after: int | None,
) -> None:
    """Carry one direction until its sender ends, or the connection breaks."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BUFFERED_SEGMENTS)

    async def deliver() -> None:
        left = 0.0  # when the last segment left the sender's side of the link
        carried = 0
        while True:
            since, segment = await waiting.get()
            link = connection.link
            left = max(left, since) + len(segment) / link.bytes_per_second
            if link.random.random() < link.stall_share:
                left += link.stall_seconds
            await asyncio.sleep(left + link.latency - loop.time())
            await (connection.link.up if up else connection.link.down).wait()
            with contextlib.suppress(OSError):  # the receiver is gone: its own side says so
                writer.write(segment)
                await writer.drain()
            arrived(len(segment))
            carried += len(segment)
            if breaks_after is not None and carried >= breaks_after:
                connection.reset()

    delivering = asyncio.create_task(deliver())
    try:
        with contextlib.suppress(OSError):
            while segment := await reader.read(SEGMENT_BYTES):
                await waiting.put((loop.time(), segment))
    finally:
        delivering.cancel()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the other side hears of it at once."""
    found = writer.get_extra_info("socket")
    if found is not None and not writer.transport.is_closing():
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    writer.transport.abort()
