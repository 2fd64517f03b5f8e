"""Downloads: what is published, from any offset, and nothing else."""

import hashlib
from collections.abc import AsyncIterator

import grpc
import pytest

from coordinator.premises import open_published
from fedloom.artifacts import PART_BYTES
from fedloom.errors import Reason
from tests.integration.federation import Federation
from tests.integration.raw import download, raw_channel, refused

CONTENT = bytes(range(256)) * 10_000  # two whole parts and a rest


@pytest.fixture
async def channel(federation: Federation) -> AsyncIterator[grpc.aio.Channel]:
    """Return a channel of an enrolled agent."""
    agent = await federation.enrol("reader")
    async with raw_channel(agent.identity) as found:
        yield found


@pytest.fixture
def published(federation: Federation) -> bytes:
    """Publish an artifact and return its SHA-256."""
    return open_published(federation.home).put(iter([CONTENT])).sha256


@pytest.mark.parametrize("offset", [0, 1, PART_BYTES, PART_BYTES + 7, len(CONTENT) - 1])
async def test_any_offset_gives_the_same_bytes(
    channel: grpc.aio.Channel, published: bytes, offset: int
) -> None:
    assert await download(channel, published, offset) == CONTENT[offset:]


async def test_a_whole_copy_asks_for_nothing_more(
    channel: grpc.aio.Channel, published: bytes
) -> None:
    assert await download(channel, published, len(CONTENT)) == b""


@pytest.mark.parametrize("beyond", [len(CONTENT) + 1, (1 << 64) - 1])
async def test_an_offset_beyond_the_end_is_refused(
    channel: grpc.aio.Channel, published: bytes, beyond: int
) -> None:
    async with refused(Reason.MALFORMED, f"at most {len(CONTENT)}"):
        await download(channel, published, beyond)


@pytest.mark.parametrize("name", [b"", b"short", b"../store.sqlite", bytes(32), bytes(33)])
async def test_what_is_not_published_is_not_found(
    channel: grpc.aio.Channel, published: bytes, name: bytes
) -> None:
    async with refused(Reason.NOT_FOUND):
        await download(channel, name)


async def test_files_of_the_coordinator_are_not_artifacts(
    federation: Federation, channel: grpc.aio.Channel
) -> None:
    for file in ("authority.key", "server.key", "store.sqlite"):
        async with refused(Reason.NOT_FOUND):
            await download(channel, hashlib.sha256((federation.home / file).read_bytes()).digest())
