"""A good agent that measures how long the coordinator takes to answer it, until it is ended.

    python -m benchmarks.probe HOME RUN_ID

It takes part in no round. Ten times a second it sends a control message that is answered (a READY
for a round that is not open, which is refused on the stream); every three seconds it connects anew,
TLS included, and awaits the welcome. Each measurement is one line: the moment, what, milliseconds.
"""

import asyncio
import sys
import time
from pathlib import Path

import grpc

from edge_agent.connection import open_channel
from edge_agent.identity import Identity, load_identity
from fedloom.v1 import control_pb2, control_pb2_grpc
from fedloom.version import PROTOCOL_VERSION

ECHO_SECONDS = 0.1
CONNECT_SECONDS = 3.0
NO_ROUND = 1 << 30
Call = grpc.aio.StreamStreamCall[control_pb2.ConnectRequest, control_pb2.ConnectResponse]


def _say(what: str, began: float) -> None:
    print(time.time(), what, round(1000 * (time.monotonic() - began), 3), flush=True)


async def _welcomed(channel: grpc.aio.Channel) -> Call:
    call: Call = control_pb2_grpc.ControlServiceStub(channel).Connect()
    hello = control_pb2.Hello(protocol_version=PROTOCOL_VERSION)
    await call.write(control_pb2.ConnectRequest(hello=hello))
    await call.read()
    return call


async def _echo(identity: Identity, run_id: bytes) -> None:
    async with open_channel(identity.control_address, identity.channel_credentials()) as channel:
        call = await _welcomed(channel)
        wrong = control_pb2.ConnectRequest(ready=control_pb2.Ready(run_id=run_id, round=NO_ROUND))
        while True:
            began = time.monotonic()
            await call.write(wrong)
            while (await call.read()).WhichOneof("step") != "refusal":
                pass
            _say("echo", began)
            await asyncio.sleep(ECHO_SECONDS)


async def _connect(identity: Identity) -> None:
    while True:
        began = time.monotonic()
        try:
            credentials = identity.channel_credentials()
            async with open_channel(identity.control_address, credentials) as channel:
                call = await _welcomed(channel)
                _say("connect", began)
                call.cancel()
        except grpc.aio.AioRpcError:
            _say("refused", began)
        await asyncio.sleep(CONNECT_SECONDS)


async def main() -> None:
    """Measure both until ended; two identities, because a newer stream supersedes an older one."""
    echoing, connecting, run_id = Path(sys.argv[1]), Path(sys.argv[2]), bytes.fromhex(sys.argv[3])
    await asyncio.gather(_echo(load_identity(echoing), run_id), _connect(load_identity(connecting)))


if __name__ == "__main__":
    asyncio.run(main())
