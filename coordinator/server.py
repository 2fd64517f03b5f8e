"""The coordinator's process: two TLS ports, three services, one conductor."""

import asyncio
import signal
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import grpc
import structlog

from coordinator.admin_listener import listening
from coordinator.authority import Authority, load_server_identity
from coordinator.conductor import Conductor
from coordinator.membership import Membership
from coordinator.operations import Operations, Serving
from coordinator.published import Published
from coordinator.roster import Roster
from coordinator.served import Served
from coordinator.services.artifacts import ArtifactService
from coordinator.services.control import ControlService
from coordinator.services.enrolment import EnrolmentService
from coordinator.sessions import Sessions
from coordinator.store import Store
from crypto import MAX_PROCESSES
from fedloom.channels import SERVER_OPTIONS
from fedloom.errors import ConfigError
from fedloom.v1 import artifact_pb2_grpc, control_pb2_grpc, enrolment_pb2_grpc

CONFIG_FILE = "coordinator.toml"
SHUTDOWN_SECONDS = 2.0
_log = structlog.get_logger()


@dataclass(frozen=True)
class ServerConfig:
    """`coordinator.toml`: where agents find this coordinator, and what it listens on."""

    address: str = "localhost"  # host name or IP address that agents connect to
    listen: str = "[::]"  # interface
    control_port: int = 7070  # mutual TLS: agents
    enrolment_port: int = 7072  # TLS: devices that have a token and no certificate yet
    crypto_processes: int = 1  # to add updates in; 1: this one, 0: one for each core
    admin_listen: str = ""  # host:port, mutual TLS: operators elsewhere; empty: local ones only

    @property
    def control_address(self) -> str:
        """`host:port` of the control and artifact services."""
        return f"{_bracketed(self.address)}:{self.control_port}"

    @property
    def enrolment_address(self) -> str:
        """`host:port` of the enrolment service."""
        return f"{_bracketed(self.address)}:{self.enrolment_port}"


def load_server_config(home: Path) -> ServerConfig:
    """Read `coordinator.toml`; raises ConfigError on unknown keys and wrong types."""
    path = home / CONFIG_FILE
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            str(path), f"expected a coordinator's folder: run `init` ({error})"
        ) from error
    known = {field.name: type(field.default) for field in fields(ServerConfig)}
    for key, value in table.items():
        if key not in known or type(value) is not known[key]:
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            raise ConfigError(str(path), f"{key} = {value!r}: expected {expected}")
    config = ServerConfig(**table)
    if not 0 <= config.crypto_processes <= MAX_PROCESSES:
        expected = f"expected 0..{MAX_PROCESSES}, found {config.crypto_processes}"
        raise ConfigError(str(path), f"crypto_processes: {expected}")
    return config


def write_server_config(home: Path, config: ServerConfig) -> None:
    """Write `coordinator.toml`."""
    lines = [
        f"{field.name} = {_toml(getattr(config, field.name))}\n" for field in fields(ServerConfig)
    ]
    (home / CONFIG_FILE).write_text("".join(lines))


def open_store(home: Path) -> Store:
    """Open the coordinator's memory."""
    return Store(home / "store.sqlite")


def open_published(home: Path) -> Published:
    """Open the folder of published artifacts."""
    return Published(home / "artifacts")


def open_operations(
    home: Path,
    config: ServerConfig,
    store: Store,
    published: Published,
    serving: Serving | None = None,
) -> Operations:
    """Put together what operators can do in this folder; `serving` is there while it is served."""
    members = Membership(
        Roster(store),
        config.enrolment_address,
        Authority.load(home).certificate_der,
        serving,
    )
    return Operations(store, published, members, home / "spool", False, serving)


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Conductor]:
    """Answer on both ports while the block runs; nothing happens until the conductor conducts."""
    config = load_server_config(home)
    authority = Authority.load(home)
    store, published, sessions = open_store(home), open_published(home), Sessions()
    conductor = Conductor(
        store,
        sessions,
        published,
        home / "spool",
        authority.certificate,
        config.crypto_processes,
    )
    server = grpc.aio.server(options=SERVER_OPTIONS)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactService(published.folder, store, conductor), server
    )
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(sessions, store, conductor), server
    )
    enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(
        EnrolmentService(authority, store, config.control_address), server
    )
    served = Served(conductor, sessions, asyncio.get_running_loop())
    operations = open_operations(home, config, store, published, served)
    try:
        with listening(operations, home, _record, config.admin_listen):
            _add_ports(server, home, config)
            await server.start()
            _log.info("serving", control=config.control_address, enrolment=config.enrolment_address)
            yield conductor
    finally:
        await server.stop(SHUTDOWN_SECONDS)
        store.close()


async def serve(home: Path, until_idle: bool) -> None:
    """Serve until SIGINT or SIGTERM, or until the queued runs are done."""
    async with serving(home) as conductor:
        conducting = asyncio.create_task(conductor.conduct(until_idle))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, conducting.cancel)
        try:
            await conducting
        except asyncio.CancelledError:
            _log.info("stopping")


def _record(operator: str, deed: str, subject: str) -> None:
    _log.info("operator's deed", operator=operator, deed=deed, subject=subject)


def _add_ports(server: grpc.aio.Server, home: Path, config: ServerConfig) -> None:
    identity = load_server_identity(home)
    pair = [(identity.private_key, identity.certificate)]
    mutual = grpc.ssl_server_credentials(pair, identity.authority, require_client_auth=True)
    one_way = grpc.ssl_server_credentials(pair)
    for port, credentials in ((config.control_port, mutual), (config.enrolment_port, one_way)):
        address = f"{config.listen}:{port}"
        try:
            server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(address, "cannot listen here: is the port taken?") from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
