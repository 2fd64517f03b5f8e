"""The coordinator's process: its ports, its services, one conductor."""

import asyncio
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from coordinator.admin_listener import listening
from coordinator.audit import AuditLog
from coordinator.authority import Authority, authority_is_offline, load_server_identity
from coordinator.conductor import Conductor
from coordinator.faults import StorageFault
from coordinator.garbage import collect_daily
from coordinator.http_port import showing
from coordinator.membership import Membership
from coordinator.metrics import Metrics
from coordinator.operations import Operations, Serving
from coordinator.published import Published, PublishedFolder
from coordinator.served import Served
from coordinator.services.access import AccessInterceptor
from coordinator.services.artifacts import ArtifactService
from coordinator.services.control import ControlService
from coordinator.services.enrolment import EnrolmentService
from coordinator.services.health import HealthGate, HealthService
from coordinator.services.limits import Admission, allow_files, connection_options, load_limits
from coordinator.services.metering import Metering
from coordinator.sessions import Sessions
from coordinator.status_page import operator_pages
from coordinator.store import Store
from coordinator.supervision import Supervisor, Unfinished, first_signal
from crypto import MAX_PROCESSES
from fedloom.channels import ENROLMENT_SERVER_OPTIONS, SERVER_OPTIONS, ChannelOptions
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.v1 import artifact_pb2_grpc, control_pb2_grpc, enrolment_pb2_grpc

CONFIG_FILE = "coordinator.toml"
SHUTDOWN_SECONDS = 2.0  # for calls to end after agents were sent away
DRAIN_SECONDS = 30.0  # for updates that were received whole to be added
STORAGE_SECONDS = 10.0  # between two tries after the store or the artifacts failed
_log = structlog.get_logger()


@dataclass(frozen=True)
class ServerConfig:
    """`coordinator.toml`: where agents find this coordinator, and what it listens on."""

    address: str = "localhost"  # host name or IP address that agents connect to
    listen: str = "[::]"  # interface
    control_port: int = 7070  # mutual TLS: agents
    enrolment_port: int = 7072  # TLS: devices that have a token and no certificate yet
    crypto_processes: int = 1  # to add updates in; 1: this one, 0: one for each core
    metrics_listen: str = "127.0.0.1:7071"  # HTTP without login: a page, /metrics; empty: off
    store: str = "sqlite"  # store.sqlite in the folder, or postgresql+psycopg://USER@HOST/DATABASE
    artifacts: str = "folder"  # artifacts/ in the folder, or s3://BUCKET/PREFIX
    artifacts_endpoint: str = ""  # URL of a server that speaks S3; empty for Amazon's
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
    table.pop("limits", None)  # read by coordinator/services/limits.py
    known = {field.name: type(field.default) for field in fields(ServerConfig)}
    for key, value in table.items():
        if key not in known or type(value) is not known[key]:
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            # Without the value: whoever misspells `store` may have written a password there.
            found = f"{key} ({type(value).__name__})"
            raise ConfigError(str(path), f"expected {expected}; found {found}")
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
    place = load_server_config(home).store
    return Store(home / "store.sqlite" if place == "sqlite" else place)


def open_published(home: Path) -> Published:
    """Open the place of published artifacts."""
    config = load_server_config(home)
    if config.artifacts == "folder":
        return PublishedFolder(home / "artifacts")
    try:
        from coordinator.bucket import open_bucket
    except ImportError as error:
        raise ConfigError(
            "artifacts", 'S3 needs more packages: pip install "fedloom[s3]"'
        ) from error
    return open_bucket(config.artifacts, config.artifacts_endpoint, home / "spool")


def open_operations(
    home: Path,
    config: ServerConfig,
    store: Store,
    published: Published,
    serving: Serving | None = None,
) -> Operations:
    """Put together what operators can do in this folder; `serving` is there while it is served."""
    members = Membership(
        store.roster,
        config.enrolment_address,
        Authority.load(home).certificate_der,
        serving,
    )
    return Operations(
        store, published, members, home / "spool", authority_is_offline(home), serving
    )


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Conductor]:
    """Answer on both ports while the block runs; nothing happens until the conductor conducts."""
    config = load_server_config(home)
    authority = Authority.load(home)
    store, published, sessions = open_store(home), open_published(home), Sessions()
    metrics, health, unfinished = Metrics(), HealthService(), Unfinished()
    limits = load_limits(home / CONFIG_FILE)
    allow_files(limits)
    admission = Admission(limits)
    conductor = Conductor(
        store,
        sessions,
        published,
        home / "spool",
        authority.certificate,
        metrics,
        config.crypto_processes,
    )
    metrics.watch_sessions(sessions)
    metrics.watch_store(store.engine)
    authority.keep_server_current(home, [config.address], datetime.now(UTC))
    interceptors: list[grpc.aio.ServerInterceptor] = [
        Metering(metrics),
        HealthGate(health),
        AccessInterceptor(store.roster),
    ]
    # Two servers, because one has one set of options; strangers find no more than they need.
    control = _server(interceptors, SERVER_OPTIONS, limits.connections)
    enrolment = _server(interceptors, ENROLMENT_SERVER_OPTIONS, limits.enrolment_connections)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactService(published, conductor, admission, unfinished), control
    )
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(sessions, store.roster, conductor, admission), control
    )
    audit = AuditLog(store.engine)
    enrolling = EnrolmentService(authority, store.roster, config.control_address, audit, admission)
    for server in (control, enrolment):
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(enrolling, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    collecting = asyncio.create_task(collect_daily(store, published, home / "spool"))
    lag = asyncio.create_task(metrics.watch_loop())
    served = Served(conductor, sessions, asyncio.get_running_loop())
    operations = open_operations(home, config, store, published, served)
    pages = operator_pages(operations, metrics)
    try:
        with listening(operations, home, audit, config.admin_listen):
            async with (
                showing(config.metrics_listen, pages) as shown,
                _answering(control, enrolment, home, config, health),
            ):
                where = {"control": config.control_address, "enrolment": config.enrolment_address}
                _log.info("serving", **where, metrics=shown)
                yield conductor
                health.serving = False
                await _drain(sessions, unfinished)
    finally:
        lag.cancel()
        collecting.cancel()
        store.close()


@asynccontextmanager
async def _answering(
    control: grpc.aio.Server,
    enrolment: grpc.aio.Server,
    home: Path,
    config: ServerConfig,
    health: HealthService,
) -> AsyncIterator[None]:
    try:
        _add_ports(control, enrolment, home, config)
        await asyncio.gather(control.start(), enrolment.start())
        health.serving = True
        yield
    finally:
        health.serving = False
        await asyncio.gather(control.stop(SHUTDOWN_SECONDS), enrolment.stop(SHUTDOWN_SECONDS))


async def _drain(sessions: Sessions, unfinished: Unfinished) -> None:
    """Send agents away, to come back, and bring to an end what was begun."""
    sessions.on_close = lambda session: None  # that we stop is no event of a run
    for session in sessions:
        session.send(Refused(Reason.INTERNAL, "the coordinator stops: connect again"))
    if not await unfinished.settled(DRAIN_SECONDS):
        _log.warning("updates were not added before the shutdown", seconds=DRAIN_SECONDS)


async def serve(home: Path, until_idle: bool) -> None:
    """Serve until SIGINT or SIGTERM, or until the queued runs are done."""
    supervisor = Supervisor()
    stopping = asyncio.create_task(first_signal())
    async with serving(home) as conductor:
        conducting = asyncio.create_task(keep_conducting(conductor, until_idle))
        watching = asyncio.create_task(supervisor.watch())
        supervisor.tell("READY=1")
        await asyncio.wait({conducting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        supervisor.tell("STOPPING=1")
        if conducting.done():
            conducting.result()
        _log.info("stopping")
    # Runs are conducted to the last: an update that was being added still has a run to go to.
    for task in (conducting, stopping, watching):
        task.cancel()


async def keep_conducting(conductor: Conductor, until_idle: bool) -> None:
    """Conduct; while the store or the artifacts fail, serve what is left and try again.

    A run is taken up from what is stored, as after a restart.
    """
    while True:
        try:
            await conductor.conduct(until_idle)
        except StorageFault as fault:
            _log.error("storage failed", problem=str(fault), again_in_seconds=STORAGE_SECONDS)
            await asyncio.sleep(STORAGE_SECONDS)
        else:
            return


def _server(
    interceptors: list[grpc.aio.ServerInterceptor], options: ChannelOptions, connections: int
) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=interceptors, options=options + connection_options(connections)
    )


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
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
