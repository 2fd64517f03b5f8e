"""HTTP/2 by hand over TLS: what a proper library refuses to send (RFC 9113)."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.integration.federation import Agent

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    *(0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8, 0x9),
)
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
ENHANCE_YOUR_CALM = 0xB


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int = -1) -> bytes:
    """Return a frame; `length` is what it claims, where that is not the truth."""
    claimed = len(payload) if length < 0 else length
    return claimed.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def field(name: str, value: str) -> bytes:
    """Return a header in HPACK, literal and not to be indexed (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(_length(len(text)) + text.encode() for text in (name, value))


def _length(count: int) -> bytes:
    if count < 127:
        return bytes([count])
    count, encoded = count - 127, bytearray([127])
    while count >= 128:
        encoded.append(count % 128 + 128)
        count //= 128
    return bytes(encoded) + bytes([count])


def call_headers(path: str, *more: tuple[str, str]) -> bytes:
    """Return the header block that begins a gRPC call."""
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "127.0.0.1"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]
    return b"".join(field(name, value) for name, value in fields)


class Peer:
    """A TLS connection that speaks HTTP/2 as badly as a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *frames: bytes) -> bool:
        """Send frames; False when the server has closed the connection."""
        try:
            self.writer.write(b"".join(frames))
            await self.writer.drain()
        except OSError:
            return False
        return not self.writer.transport.is_closing()

    async def received(self) -> AsyncIterator[tuple[int, int, int, bytes]]:
        """Yield the server's frames as (kind, flags, stream, payload) until it closes."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
                yield head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, payload

    async def goaway(self) -> tuple[int, bytes] | None:
        """Return the last GOAWAY's error and text before the server closed; None without one."""
        found = None
        async for kind, _, _, payload in self.received():
            if kind == GOAWAY:
                found = int.from_bytes(payload[4:8], "big"), payload[8:]
        return found


def tls_context(agent: Agent | None = None) -> ssl.SSLContext:
    """Return a client's settings; with an agent, its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # an attacker does not care whom it attacks
    context.set_alpn_protocols(["h2"])
    if agent is not None:
        context.load_cert_chain(agent.home / "agent.pem")  # with its key
    return context


@asynccontextmanager
async def peer(port: int, agent: Agent | None = None) -> AsyncIterator[Peer]:
    """Connect, and end without ceremony."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls_context(agent))
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def greeted(port: int, agent: Agent | None = None) -> AsyncIterator[Peer]:
    """Connect and exchange HTTP/2's first frames."""
    async with peer(port, agent) as found:
        await found.send(PREFACE, frame(SETTINGS, 0, 0), frame(SETTINGS, ACK, 0))
        yield found
