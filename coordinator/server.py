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

from coordinator.authority import Authority, load_server_identity
from coordinator.conductor import Conductor
from coordinator.published import Published
from coordinator.services.artifacts import ArtifactService
from coordinator.services.control import ControlService
from coordinator.services.enrolment import EnrolmentService
from coordinator.services.limits import Admission, allow_files, connection_options, load_limits
from coordinator.sessions import Sessions
from coordinator.store import Store
from fedloom.channels import ENROLMENT_SERVER_OPTIONS, SERVER_OPTIONS, ChannelOptions
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
    table.pop("limits", None)  # read by coordinator/services/limits.py
    known = {field.name: type(field.default) for field in fields(ServerConfig)}
    for key, value in table.items():
        if key not in known or type(value) is not known[key]:
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            raise ConfigError(str(path), f"{key} = {value!r}: expected {expected}")
    return ServerConfig(**table)


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


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Conductor]:
    """Answer on both ports while the block runs; nothing happens until the conductor conducts."""
    config = load_server_config(home)
    authority = Authority.load(home)
    store, published, sessions = open_store(home), open_published(home), Sessions()
    conductor = Conductor(store, sessions, published, home / "spool", authority.certificate)
    limits = load_limits(home / CONFIG_FILE)
    allow_files(limits)
    admission = Admission(limits)
    # Two servers, because one has one set of options; strangers find one service.
    control = _server(SERVER_OPTIONS, limits.connections)
    enrolment = _server(ENROLMENT_SERVER_OPTIONS, limits.enrolment_connections)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactService(published.folder, store, conductor, admission), control
    )
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(sessions, store, conductor, admission), control
    )
    enrolling = EnrolmentService(authority, store, config.control_address, admission)
    for server in (control, enrolment):
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(enrolling, server)
    try:
        _add_ports(control, enrolment, home, config)
        await asyncio.gather(control.start(), enrolment.start())
        _log.info("serving", control=config.control_address, enrolment=config.enrolment_address)
        yield conductor
    finally:
        await asyncio.gather(control.stop(SHUTDOWN_SECONDS), enrolment.stop(SHUTDOWN_SECONDS))
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


def _server(options: ChannelOptions, connections: int) -> grpc.aio.Server:
    return grpc.aio.server(options=options + connection_options(connections))


def _add_ports(
    control: grpc.aio.Server, enrolment: grpc.aio.Server, home: Path, config: ServerConfig
) -> None:
    identity = load_server_identity(home)
    pair = [(identity.private_key, identity.certificate)]
    mutual = grpc.ssl_server_credentials(pair, identity.authority, require_client_auth=True)
    one_way = grpc.ssl_server_credentials(pair)
    for server, port, credentials in (
        (control, config.control_port, mutual),
        (enrolment, config.enrolment_port, one_way),
    ):
        address = f"{config.listen}:{port}"
        try:
            server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(address, "cannot listen here: is the port taken?") from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
