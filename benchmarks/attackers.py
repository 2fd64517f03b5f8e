"""Attackers as processes of their own, cheap enough to be many: raw sockets, prepared bytes.

    python -m benchmarks.attackers joins PORT TOTAL CONNECTIONS
    python -m benchmarks.attackers slowloris PORT SECONDS CONNECTIONS
    python -m benchmarks.attackers handshakes PORT SECONDS CONNECTIONS

Each prints one JSON object: what it did, and what it got for it.
"""

import asyncio
import json
import ssl
import sys
import time
from collections import Counter

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.identity import certificate_request
from fedloom.v1 import enrolment_pb2

STREAMS = 1  # calls at a time on one connection: as many as the enrolment port permits
BYTE_SECONDS = 1.0  # how often slowloris says something
TRIES_PER_SECOND = 2.0  # of one attacker whose connection was closed
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0x1, 0x3, 0x4, 0x6, 0x7
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
seen: Counter[str] = Counter()


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


def _field(name: str, value: str) -> bytes:
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


class Joins:
    """Bogus joins: well-formed calls with a signing request that is right and a wrong secret."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._headers = b"".join(
            _field(*pair)
            for pair in (
                (":method", "POST"),
                (":scheme", "https"),
                (":path", "/fedloom.v1.EnrolmentService/Enrol"),
                (":authority", "localhost"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            )
        )
        request = certificate_request(ec.generate_private_key(ec.SECP256R1()))
        message = enrolment_pb2.EnrolRequest(
            secret=bytes(32), certificate_request=request.public_bytes(serialization.Encoding.DER)
        )
        payload = message.SerializeToString()
        self._message = b"\0" + len(payload).to_bytes(4, "big") + payload

    def _call(self, stream: int) -> bytes:
        self._left -= 1
        return _frame(_HEADERS, _END_HEADERS, stream, self._headers) + _frame(
            0, _END_STREAM, stream, self._message
        )

    async def attack(self, port: int, context: ssl.SSLContext) -> None:
        """Connect again and again until all joins were tried."""
        while self._left > 0:
            try:
                await self._on_a_connection(port, context)
            except (OSError, asyncio.IncompleteReadError):
                seen["connections lost"] += 1
                await asyncio.sleep(1 / TRIES_PER_SECOND)

    async def _on_a_connection(self, port: int, context: ssl.SSLContext) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        seen["connections"] += 1
        try:
            writer.write(_PREFACE + _frame(_SETTINGS, 0, 0) + _frame(_SETTINGS, _ACK, 0))
            opened, answered = 0, 0
            while self._left > 0 or answered < opened:
                while opened - answered < STREAMS and self._left > 0:
                    writer.write(self._call(2 * opened + 1))
                    opened += 1
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags = head[3], head[4]
                if kind == _RST_STREAM or (kind == _HEADERS and flags & _END_STREAM):
                    answered += 1
                    seen["answered" if kind == _HEADERS else "reset"] += 1
                elif kind == _PING and not flags & _ACK:
                    writer.write(_frame(_PING, _ACK, 0, payload))
                elif kind == _GOAWAY:
                    return
        finally:
            writer.transport.abort()


async def _slowly(port: int, hello: bytes, end: float) -> None:
    while time.monotonic() < end:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            seen["refused"] += 1
            await asyncio.sleep(1 / TRIES_PER_SECOND)
            continue
        seen["connections"] += 1
        for byte in hello:
            writer.write(bytes([byte]))
            try:
                async with asyncio.timeout(BYTE_SECONDS):
                    await reader.read(1)  # nothing comes but the end
                break
            except TimeoutError:
                if time.monotonic() > end:
                    break
            except OSError:
                break
        writer.transport.abort()
        seen["closed"] += 1
        await asyncio.sleep(1 / TRIES_PER_SECOND)


async def _handshakes(port: int, context: ssl.SSLContext, end: float) -> None:
    while time.monotonic() < end:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.transport.abort()
            seen["handshakes"] += 1
        except OSError:
            seen["refused"] += 1


async def main() -> None:
    """Attack as the command line says."""
    kind, port, amount, connections = sys.argv[1], *map(int, sys.argv[2:])
    context, began = _tls(), time.monotonic()
    async with asyncio.TaskGroup() as group:
        joins = Joins(amount)
        hello = ssl.MemoryBIO()
        try:
            context.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
        except ssl.SSLWantReadError:
            prepared = hello.read()
        for _ in range(connections):
            group.create_task(
                joins.attack(port, context)
                if kind == "joins"
                else _slowly(port, prepared, began + amount)
                if kind == "slowloris"
                else _handshakes(port, context, began + amount)
            )
    print(json.dumps({**seen, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    asyncio.run(main())
