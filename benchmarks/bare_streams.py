"""The floor under idle agents: gRPC's own asyncio server with the product's TLS, and nothing else.

    python -m benchmarks.bare_streams COORDINATORS_FOLDER PORT

It welcomes whoever connects and then waits: what it holds for a connection no coordinator on this
library can do without.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from coordinator.authority import load_server_identity
from fedloom.channels import SERVER_OPTIONS
from fedloom.memory import limit_arenas
from fedloom.v1 import control_pb2
from fedloom.version import PROTOCOL_VERSION

_SERVICE = "fedloom.v1.ControlService"
_WELCOME = control_pb2.ConnectResponse(
    welcome=control_pb2.Welcome(protocol_version=PROTOCOL_VERSION)
).SerializeToString()


async def _connect(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    await anext(requests)
    yield _WELCOME
    await anext(requests, None)  # an idle agent says nothing more


async def _serve(home: Path, port: int) -> None:
    identity = load_server_identity(home)
    pair = [(identity.private_key, identity.certificate)]
    credentials = grpc.ssl_server_credentials(pair, identity.authority, require_client_auth=True)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(_connect)  # type: ignore[arg-type]
    handlers = grpc.method_handlers_generic_handler(_SERVICE, {"Connect": handler})
    server.add_generic_rpc_handlers((handlers,))
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    print('{"event": "serving"}', flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    limit_arenas()
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))
