"""The reference: asyncio gRPC that moves as many bytes as a round and does nothing with them.

One server and K client processes. In a round every client streams its bytes up in 1 MiB parts; when
the server has had all of them it answers, and every client has its bytes streamed down. Parts are
raw bytes, without protobuf around them; nothing is kept, added, hashed or written. With TLS, the
keys and the mutual authentication are the product's.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc

from benchmarks.federation import Federation
from benchmarks.processes import Children, Failed, free_port

SERVICE = "fedloom.benchmarks.Bare"
PART_BYTES = 1 << 20
CONNECT_SECONDS = 30.0
TRANSFER_SECONDS = 600.0


def measure(
    federation: Federation, folder: Path, agents: int, volume: tuple[int, int], rounds: int
) -> list[float]:
    """Return seconds per round after one to warm up; `volume` is bytes up and down per agent.

    `federation` lends its keys.
    """
    return _measure(folder, agents, volume, rounds, [federation.coordinator, *federation.homes])


def measure_insecure(
    folder: Path, agents: int, volume: tuple[int, int], rounds: int
) -> list[float]:
    """Return the same without TLS."""
    return _measure(folder, agents, volume, rounds, [])


def _measure(
    folder: Path, agents: int, volume: tuple[int, int], rounds: int, homes: list[Path]
) -> list[float]:
    folder.mkdir(exist_ok=True)
    numbers = [str(number) for number in (free_port(), agents, *volume, rounds + 2)]
    command = [sys.executable, "-m", "benchmarks.bare_grpc"]
    log = folder / "bare-server.log"
    with Children() as children:
        for number in range(agents + 1):
            role = "client" if number else "server"
            keys = [f"--home={homes[number]}"] if homes else []
            output = folder / f"bare-client-{number}.log" if number else log
            children.start([*command, role, *numbers, *keys], output)
        children.wait(TRANSFER_SECONDS)
    moments = json.loads(log.read_text())
    if len(moments) != rounds + 2:
        raise Failed(f"expected {rounds + 2} rounds of the reference, found {len(moments)}")
    return [end - start for start, end in pairwise(moments)][1:]


class _Server:
    """Counts rounds at the moment when all clients have sent."""

    def __init__(self, agents: int, bytes_down: int, rounds: int) -> None:
        self.moments: list[float] = []
        self.done = asyncio.Event()
        self._all_sent = asyncio.Barrier(agents)
        self._bytes_down = bytes_down
        self._left = agents * rounds  # downloads

    async def upload(self, requests: AsyncIterator[bytes], _: Any) -> bytes:
        async for _part in requests:
            pass
        if await self._all_sent.wait() == 0:
            self.moments.append(time.monotonic())
        return b""

    async def download(self, _request: bytes, _: Any) -> AsyncIterator[bytes]:
        for part in _parts(self._bytes_down):
            yield part
        self._left -= 1
        if not self._left:
            self.done.set()


def _parts(size: int) -> Iterator[bytes]:
    whole = bytes(PART_BYTES)
    for _ in range(size // PART_BYTES):
        yield whole
    if size % PART_BYTES:
        yield whole[: size % PART_BYTES]


async def _serve(options: argparse.Namespace) -> None:
    bare, server = _Server(options.agents, options.bytes_down, options.rounds), grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Upload": grpc.stream_unary_rpc_method_handler(bare.upload),
        "Download": grpc.unary_stream_rpc_method_handler(bare.download),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = f"127.0.0.1:{options.port}"
    if options.home is None:
        server.add_insecure_port(address)
    else:
        from coordinator.authority import load_server_identity

        identity = load_server_identity(options.home)
        pair = [(identity.private_key, identity.certificate)]
        credentials = grpc.ssl_server_credentials(pair, identity.authority, True)
        server.add_secure_port(address, credentials)
    await server.start()
    await bare.done.wait()
    await server.stop(1.0)
    print(json.dumps(bare.moments))


async def _take_part(options: argparse.Namespace) -> None:
    async with _channel(options) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        upload: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            f"/{SERVICE}/Upload"
        )
        download: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            f"/{SERVICE}/Download"
        )
        for _ in range(options.rounds):
            await upload(_parts(options.bytes_up))
            received = 0
            async for part in download(b""):
                received += len(part)
            if received != options.bytes_down:
                raise Failed(f"expected {options.bytes_down} bytes, found {received}")


def _channel(options: argparse.Namespace) -> grpc.aio.Channel:
    address = f"127.0.0.1:{options.port}"
    if options.home is None:
        return grpc.aio.insecure_channel(address)
    from edge_agent.identity import load_identity

    return grpc.aio.secure_channel(address, load_identity(options.home).channel_credentials())


def main() -> None:
    """Be the server or one client."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["server", "client"])
    for number in ("port", "agents", "bytes_up", "bytes_down", "rounds"):
        parser.add_argument(number, type=int)
    parser.add_argument("--home", type=Path, help="keys for mutual TLS; without: no TLS")
    options = parser.parse_args()
    asyncio.run(_serve(options) if options.role == "server" else _take_part(options))


if __name__ == "__main__":
    main()
