"""The operator's HTTP port: whatever a client sends or fails to send, the next one is answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import http_port
from coordinator.http_port import Page, parse_listen, showing
from fedloom.errors import ConfigError

BODY = b"x" * 1_000_000  # more than a socket buffers
PAGES = {"/": lambda: Page("text/plain", b"page"), "/large": lambda: Page("text/plain", BODY)}
REQUEST = b"GET / HTTP/1.1\r\n\r\n"


@asynccontextmanager
async def port(pages: http_port.Pages = PAGES) -> AsyncIterator[int]:
    """Serve on loopback and yield the port."""
    async with showing("127.0.0.1:0", pages) as where:
        yield int(where.rpartition(":")[2])


async def exchange(number: int, sent: bytes, end: bool = False) -> bytes:
    """Send bytes and return all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    writer.write(sent)
    if end:
        writer.write_eof()
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def answers(number: int) -> bool:
    """Whether a good request gets its page."""
    found = await exchange(number, REQUEST)
    return found.startswith(b"HTTP/1.1 200 OK\r\n") and found.endswith(b"\r\n\r\npage")


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=200) | st.just(b"GET /") | st.just(b"\r\n\r\n")))
def test_garbage_is_no_page_and_costs_the_next_client_nothing(parts: list[bytes]) -> None:
    async def one() -> None:
        async with port() as number:
            found = await exchange(number, b"".join(parts), end=True)
            assert not found.startswith(b"HTTP/1.1 200")
            assert await answers(number)

    asyncio.run(one())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", b"200"),
        (b"GET /?q=/metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"GET //large HTTP/1.1\r\n\r\n", b"404"),
        (b"POST / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET / HTTP/2\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
    ],
)
async def test_only_get_of_a_known_path_is_a_page(sent: bytes, status: bytes) -> None:
    async with port() as number:
        assert (await exchange(number, sent)).split(b" ")[1] == status


async def test_head_tells_the_size_without_the_body() -> None:
    async with port() as number:
        found = await exchange(number, b"HEAD /large HTTP/1.1\r\n\r\n")
        assert b"Content-Length: 1000000\r\n" in found
        assert found.endswith(b"\r\n\r\n")
        assert (await exchange(number, b"GET /large HTTP/1.1\r\n\r\n")).endswith(BODY)


async def test_a_head_that_does_not_end_is_cut_off() -> None:
    async with port() as number:
        assert await exchange(number, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000) == b""
        assert await answers(number)


@pytest.mark.parametrize("request_of_the_slow", [b"GET / HT", b"GET /large HTTP/1.1\r\n\r\n"])
async def test_clients_that_stall_give_their_places_up(
    monkeypatch: pytest.MonkeyPatch, request_of_the_slow: bytes
) -> None:
    monkeypatch.setattr(http_port, "ANSWER_SECONDS", 0.3)
    async with port() as number:
        stalled = []
        for _ in range(http_port.MAX_CONNECTIONS):
            reader, writer = await asyncio.open_connection("127.0.0.1", number, limit=1024)
            writer.write(request_of_the_slow)  # and it reads nothing, so the transport pauses
            stalled.append((reader, writer))
        for _ in range(1000):
            if await answers(number):
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("expected an answer once the slow were cut off")
        for _, writer in stalled:
            writer.close()


async def test_a_page_that_fails_is_told_to_the_log_alone() -> None:
    def broken() -> Page:
        raise RuntimeError("the store's password")

    async with port({"/": broken}) as number:
        found = await exchange(number, REQUEST)
    assert found.startswith(b"HTTP/1.1 500")
    assert b"password" not in found


@pytest.mark.parametrize("listen", ["7071", ":7071", "127.0.0.1", "127.0.0.1:x", "h:65536", "h:²"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:7071"):
        parse_listen(listen)


def test_addresses_of_both_families_are_read() -> None:
    assert parse_listen("127.0.0.1:7071") == ("127.0.0.1", 7071)
    assert parse_listen("[::1]:0") == ("::1", 0)


async def test_nothing_listens_when_it_is_off() -> None:
    async with showing("", PAGES) as where:
        assert where == ""
