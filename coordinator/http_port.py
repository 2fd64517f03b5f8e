"""The operator's HTTP port, read only: a page for people, series for Prometheus.

It has no login and no TLS, so it listens on loopback unless the configuration says otherwise. It is
small on purpose: one request a connection, a deadline for all of it, and few connections at once,
so that a client that is slow or speaks something else costs a moment of one connection.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from fedloom.errors import ConfigError

MAX_CONNECTIONS = 16
MAX_HEAD_BYTES = 8192
ANSWER_SECONDS = 5.0
_log = structlog.get_logger()


@dataclass(frozen=True)
class Page:
    """An answer: its type and its text."""

    content_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]  # by path; called in a thread


@asynccontextmanager
async def showing(listen: str, pages: Pages) -> AsyncIterator[str]:
    """Answer at `host:port` while the block runs; yield where, or nothing when that failed.

    A port that is taken is no reason to stop training: it is logged, and runs go on unseen.
    """
    if not listen:
        yield ""
        return
    host, port = parse_listen(listen)
    try:
        server = await _listening(_Listener(pages).answer, host, port)
    except OSError as error:
        _log.warning("metrics are off", listen=listen, problem=error.strerror)
        yield ""
        return
    found = server.sockets[0].getsockname()
    try:
        yield f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def _listening(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    host: str,
    port: int,
) -> asyncio.Server:
    """Listen; asyncio alone would leave the socket open where the port is taken."""
    limit = MAX_HEAD_BYTES
    server = await asyncio.start_server(answer, host, port, limit=limit, start_serving=False)
    try:
        await server.start_serving()
    except OSError:
        server.close()
        raise
    return server


def parse_listen(listen: str) -> tuple[str, int]:
    """Return host and port of `host:port`; raises ConfigError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            "metrics_listen", f"expected host:port such as 127.0.0.1:7071, found {listen!r}"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Listener:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._connections = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close; whatever is not one is closed unanswered."""
        if self._connections >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections += 1
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._response(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass  # too slow, too long, or gone
        finally:
            self._connections -= 1
            writer.transport.abort()

    async def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _http("400 Bad Request", _TEXT, b"expected HTTP/1\n")
        if method not in (b"GET", b"HEAD"):
            return _http("405 Method Not Allowed", _TEXT, b"expected GET\n")
        page = self._pages.get(target.partition(b"?")[0].decode("latin-1"))
        if page is None:
            return _http("404 Not Found", _TEXT, b"expected / or /metrics\n")
        try:
            found = await asyncio.to_thread(page)
        except Exception:  # the top of a request: what fails here must not end the coordinator
            _log.exception("page failed")
            return _http("500 Internal Server Error", _TEXT, b"see the coordinator's log\n")
        return _http("200 OK", found.content_type, found.body, with_body=method == b"GET")


_TEXT = "text/plain; charset=utf-8"


def _http(status: str, content_type: str, body: bytes, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
        "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
