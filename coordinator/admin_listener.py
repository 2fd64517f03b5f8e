"""Listens for operators: on the folder's unix socket, and with mutual TLS on a port if told so.

The threads here are apart from the event loop that serves agents.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import grpc
import structlog

from coordinator.admin_socket import claimed_socket, private_umask
from coordinator.audit import AuditLog, local_operator
from coordinator.authority import load_server_identity
from coordinator.operations import Operations
from coordinator.operators import Operators
from coordinator.services.admin import AdminService, Context, Identify, Reception
from fedloom.channels import ADMIN_SERVER_OPTIONS
from fedloom.errors import ConfigError
from fedloom.v1 import admin_pb2_grpc

MAX_CALLS = 64  # at once, on each listener; every watcher is one
_log = structlog.get_logger()


@contextmanager
def listening(
    operations: Operations, home: Path, audit: AuditLog, address: str = ""
) -> Iterator[None]:
    """Answer operators while the block runs; `address` (`host:port`) is for those elsewhere."""
    with claimed_socket(home) as path:
        servers = [_local_server(operations, audit, path)]
        if address:
            servers.append(_remote_server(operations, audit, home, address))
        for server in servers:
            server.start()
        _log.info("serving operators", socket=str(path), address=address or None)
        try:
            yield
        finally:
            for stopping in [server.stop(0) for server in servers]:
                stopping.wait()


@contextmanager
def answering(operations: Operations, audit: AuditLog, path: Path) -> Iterator[None]:
    """Answer on one socket, in a folder that is the caller's alone, for one command."""
    server = _local_server(operations, audit, path)
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


def _local_server(operations: Operations, audit: AuditLog, path: Path) -> grpc.Server:
    server = _server(operations, audit, lambda _: local_operator())
    credentials = grpc.local_server_credentials(grpc.LocalConnectionType.UDS)
    with private_umask():
        _listen(server, f"unix:{path}", credentials)
    return server


def _remote_server(
    operations: Operations, audit: AuditLog, home: Path, address: str
) -> grpc.Server:
    operators = Operators(home)

    def identify(context: Context) -> str:
        shown = cast("list[bytes]", context.auth_context().get("x509_pem_cert", []))
        return f"operator {operators.identify(shown[0] if shown else None)}"

    server = _server(operations, audit, identify)
    _listen(server, address, _pinning_credentials(home, operators))
    return server


def _pinning_credentials(home: Path, operators: Operators) -> grpc.ServerCredentials:
    """Admit exactly the operators whose certificates are in the folder at the time of a call."""
    identity = load_server_identity(home)

    def trusted() -> grpc.ServerCertificateConfiguration:
        # Without operators nobody is admitted, but TLS needs an anchor: `identify` has the word.
        anchors = b"".join(operators.certificates()) or identity.authority
        pair = (identity.private_key, identity.certificate)
        return grpc.ssl_server_certificate_configuration([pair], anchors)

    return grpc.dynamic_ssl_server_credentials(
        trusted(), trusted, require_client_authentication=True
    )


def _server(operations: Operations, audit: AuditLog, identify: Identify) -> grpc.Server:
    server = grpc.server(
        ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="operators"),
        interceptors=[Reception(identify)],
        options=ADMIN_SERVER_OPTIONS,
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    service = AdminService(operations, identify, audit)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    return server


def _listen(server: grpc.Server, address: str, credentials: grpc.ServerCredentials) -> None:
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(address, "cannot listen here for operators: is it taken?") from error
