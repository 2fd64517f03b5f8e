"""Pings: a client in a hurry is served, a flood is not, and an idle connection lives."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from fedloom.channels import (
    CLIENT_OPTIONS,
    ENROLMENT_SERVER_OPTIONS,
    KEEPALIVE,
    SERVER_OPTIONS,
    ChannelOptions,
)
from tests.integration.federation import PATIENCE_SECONDS, Federation
from tests.integration.raw import RawControl
from tests.network import http2
from tests.network.proxy import Link, proxy

HURRY: ChannelOptions = [
    (key, 600 if key == "grpc.keepalive_time_ms" else value) for key, value in CLIENT_OPTIONS
]


@pytest.mark.parametrize("calls", [True, False], ids=["on an idle stream", "without calls"])
async def test_a_client_in_a_hurry_keeps_its_idle_connection(
    federation: Federation, calls: bool
) -> None:
    identity = (await federation.enrol("hasty")).identity
    async with proxy(federation.control_port, Link()) as found:
        address, credentials = found.address, identity.channel_credentials()
        async with grpc.aio.secure_channel(address, credentials, options=HURRY) as channel:
            control = RawControl(channel)
            await control.hello(replace(identity, control_address=address))
            if not calls:
                control.call.cancel()
            before = found.up_bytes
            await asyncio.sleep(5)  # eight pings: gRPC's own patience ends at the third
            assert found.up_bytes - before > 8 * 17, "nobody pinged"
            await RawControl(channel).hello(identity)
        assert len(found.connections) == 1
        assert not found.connections[0].coordinator_gone


@pytest.mark.parametrize("port", ["control", "enrolment"])
async def test_a_flood_of_pings_is_told_to_calm_down(federation: Federation, port: str) -> None:
    agent = await federation.enrol("pinger")
    number = federation.control_port if port == "control" else federation.enrolment_port
    async with asyncio.timeout(PATIENCE_SECONDS), http2.greeted(number, agent) as peer:
        strikes = int(dict(SERVER_OPTIONS)["grpc.http2.max_ping_strikes"])
        await peer.send(*(http2.frame(http2.PING, 0, 0, bytes(8)) for _ in range(strikes + 2)))
        assert await peer.goaway() == (http2.ENHANCE_YOUR_CALM, b"too_many_pings")


def test_no_side_pings_faster_than_the_other_permits() -> None:
    alive = dict(KEEPALIVE)
    for options in (SERVER_OPTIONS, ENROLMENT_SERVER_OPTIONS):
        server = dict(options)
        assert int(server["grpc.http2.min_ping_interval_without_data_ms"]) < int(
            dict(CLIENT_OPTIONS)["grpc.keepalive_time_ms"]
        )
        assert alive.items() <= server.items()
    assert alive.items() <= dict(CLIENT_OPTIONS).items()
