"""The coordinator's process: its ports, its services, one conductor."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from coordinator.admin_listener import listening
from coordinator.audit import AuditLog
from coordinator.authority import Authority, load_server_identity
from coordinator.conductor import Conductor
from coordinator.facilities import Facilities
from coordinator.faults import StorageFault
from coordinator.garbage import collect_daily
from coordinator.http_port import showing
from coordinator.memory import keep_tidy
from coordinator.metrics import Metrics
from coordinator.premises import (
    CONFIG_FILE,
    ServerConfig,
    load_server_config,
    open_operations,
    open_published,
    open_store,
)
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
from coordinator.steering import Steering
from coordinator.supervision import Supervisor, Unfinished, first_signal
from fedloom.channels import ENROLMENT_SERVER_OPTIONS, SERVER_OPTIONS, ChannelOptions
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.v1 import artifact_pb2_grpc, control_pb2_grpc, enrolment_pb2_grpc

SHUTDOWN_SECONDS = 2.0  # for calls to end after agents were sent away
DRAIN_SECONDS = 30.0  # for updates that were received whole to be added
STORAGE_SECONDS = 10.0  # between two tries after the store or the artifacts failed
_log = structlog.get_logger()


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Conductor]:
    """Answer on both ports while the block runs; nothing happens until the conductor conducts."""
    config = load_server_config(home)
    authority = Authority.load(home)
    store, published, sessions = open_store(home), open_published(home), Sessions()
    metrics, health, unfinished = Metrics(), HealthService(), Unfinished()
    limits = load_limits(home / CONFIG_FILE)
    allow_files(limits)
    steering = Steering(store.roster.count, limits.streams)
    admission = Admission(limits)
    admission.retry_seconds = steering.refused
    spool, certificate = home / "spool", authority.certificate
    conductor = Conductor(
        Facilities(
            *(store, sessions, published, spool, certificate, metrics, steering),
            config.crypto_processes,
        )
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
    collecting = asyncio.create_task(collect_daily(store, published, spool))
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
        tidying = asyncio.create_task(keep_tidy())
        supervisor.tell("READY=1")
        await asyncio.wait({conducting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        supervisor.tell("STOPPING=1")
        if conducting.done():
            conducting.result()
        _log.info("stopping")
    # Runs are conducted to the last: an update that was being added still has a run to go to.
    for task in (conducting, stopping, watching, tidying):
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
