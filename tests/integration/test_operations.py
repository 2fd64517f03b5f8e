"""What an operator's machinery sees: health, metrics, the end of the process, and its record."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from coordinator.audit import AuditLog, local_operator
from coordinator.metrics import RoundOutcome, Side
from coordinator.premises import load_server_config, write_server_config
from coordinator.probe import main as probe
from coordinator.run_state import Phase
from coordinator.services.access import REQUIRED_ROLE
from coordinator.services.health import SERVICES
from fedloom.errors import Reason
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc, control_pb2, refusal_pb2
from fedloom.version import PROTOCOL_VERSION
from tests.integration.federation import PATIENCE_SECONDS, Agent, Federation, free_ports, until
from tests.integration.processes import process
from tests.integration.raw import RawControl, raw_channel, refused

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Series = Mapping[str, Metric]


@pytest.fixture
async def watched(federation: Federation) -> Federation:
    """A federation with an HTTP port."""
    await federation.stop()
    (port,) = free_ports(1)
    config = replace(load_server_config(federation.home), metrics_listen=f"127.0.0.1:{port}")
    write_server_config(federation.home, config)
    await federation.start()
    return federation


async def get(federation: Federation, path: str) -> str:
    """Return what the HTTP port answers."""
    port = load_server_config(federation.home).metrics_listen.rpartition(":")[2]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 OK"), head
    return body.decode()


async def scrape(federation: Federation) -> Series:
    """Return the series by name."""
    text = await get(federation, "/metrics")
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(series: Series, sample: str, **labels: str) -> float:
    """Return one sample's value."""
    found = [
        s.value
        for family in series.values()
        for s in family.samples
        if s.name == sample and s.labels == labels
    ]
    assert len(found) == 1, (sample, labels)
    return found[0]


@asynccontextmanager
async def enrolment_port(federation: Federation) -> AsyncIterator[grpc.aio.Channel]:
    """Open a channel as a load balancer does: it knows the authority and has no certificate."""
    authority = (federation.home / "authority.pem").read_bytes()
    address = f"localhost:{federation.enrolment_port}"
    credentials = grpc.ssl_channel_credentials(authority)
    async with grpc.aio.secure_channel(address, credentials) as channel:
        yield channel


async def check(channel: grpc.aio.Channel, service: str = "") -> int:
    """Ask for the health of a service."""
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_SECONDS)
    return int(answer.status)


@asynccontextmanager
async def connected(agent: Agent) -> AsyncIterator[RawControl]:
    """Hold a control stream of this agent."""
    async with raw_channel(agent.identity) as channel:
        control = RawControl(channel)
        await control.hello(agent.identity, protocol_version=PROTOCOL_VERSION)
        yield control


# health


async def test_anyone_may_ask_for_the_health_of_each_service(federation: Federation) -> None:
    async with enrolment_port(federation) as channel:
        assert [await check(channel, service) for service in SERVICES] == [SERVING] * 4
        for service in ("fedloom.v1", "x" * 10_000):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(channel, service)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_probe_says_what_health_says(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = str(federation.home / "authority.pem")
    arguments = [f"localhost:{federation.enrolment_port}", authority]
    assert await asyncio.to_thread(probe, arguments) == 0
    assert capsys.readouterr().out == "SERVING\n"
    assert await asyncio.to_thread(probe, [*arguments, "--service", "nobody"]) == 1
    assert await asyncio.to_thread(probe, [arguments[0], "/nowhere"]) == 1
    await federation.stop()
    assert await asyncio.to_thread(probe, arguments) == 1
    assert "UNAVAILABLE" in capsys.readouterr().out


# shutdown


async def test_a_shutdown_ends_the_update_being_added_and_sends_agents_away(
    federation: Federation,
) -> None:
    agent = await federation.enrol("device")
    conductor, adding, may_end = federation.conductor, asyncio.Event(), asyncio.Event()
    added = False

    async def accept_upload(upload: object, path: Path) -> None:
        nonlocal added
        adding.set()
        await may_end.wait()
        added = True

    spooled = federation.folder / "update"
    with patch.multiple(conductor, upload_path=lambda _: spooled, accept_upload=accept_upload):
        async with connected(agent) as control, raw_channel(agent.identity) as channel:
            call = artifact_pb2_grpc.ArtifactServiceStub(channel).UploadArtifact()
            header = artifact_pb2.UploadHeader(
                size_bytes=0, sha256=bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb924"
                "27ae41e4649b934ca495991b7852b855"), run_id=bytes(16), round=1, attempt=1,
            )  # fmt: skip
            await call.write(artifact_pb2.UploadArtifactRequest(header=header))
            await adding.wait()
            async with enrolment_port(federation) as balancer:
                assert await check(balancer) == SERVING
                stopping = asyncio.create_task(federation.stop())
                async with refused(Reason.INTERNAL, "the coordinator stops"):
                    await control.ended()
                assert await check(balancer) == NOT_SERVING
            comes = refused(Reason.INTERNAL, "connect again")
            async with raw_channel(agent.identity) as again, comes:
                await RawControl(again).ended()
            assert not stopping.done()
            may_end.set()
            answers = [answer.WhichOneof("step") async for answer in call]
            await stopping
    assert added
    assert answers == ["resume_from", "stored"]


async def test_what_takes_too_long_is_left_to_the_next_start(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.server.DRAIN_SECONDS", 0.1)
    with patch("coordinator.supervision.Unfinished.settled", autospec=True) as settled:
        settled.return_value = False
        await federation.stop()
    assert settled.await_args.args[1] == 0.1


@asynccontextmanager
async def served(
    federation: Federation, log: Path, before: str = "", **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Serve the federation's home in a process."""
    assignments = "".join(f"os.environ[{k!r}] = {v!r}\n" for k, v in environment.items())
    program = f"import os\n{assignments}{before}\nfrom coordinator.app import main; main()"
    async with process(log, "-c", program, "serve", "--home", federation.home, "--json") as started:
        await until("it to serve", lambda: '"event": "serving"' in log.read_text())
        yield started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_in_order_and_systemd_hears_of_it(
    federation: Federation, tmp_path: Path, number: signal.Signals
) -> None:
    await federation.stop()
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(path)
        supervisor.setblocking(False)
        environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "300000"}
        async with served(federation, tmp_path / "log", **environment) as started:
            loop = asyncio.get_running_loop()
            told = [await loop.sock_recv(supervisor, 100) for _ in range(4)]
            started.send_signal(number)
            assert await started.wait() == 0
            while told[-1] != b"STOPPING=1":
                told.append(await loop.sock_recv(supervisor, 100))
    assert told.count(b"READY=1") == 1
    assert set(told) == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}


async def test_a_second_signal_ends_the_process_at_once(
    federation: Federation, tmp_path: Path
) -> None:
    await federation.stop()
    hanging = (
        "import time\nfrom coordinator.supervision import Unfinished\n"
        "async def settled(self, seconds):\n"
        "    os.write(2, b'draining'); time.sleep(3600)\n"  # not even the event loop runs
        "Unfinished.settled = settled\n"
    )
    log = tmp_path / "log"
    async with served(federation, log, before=hanging) as started:
        started.terminate()
        await until("it to drain", lambda: "draining" in log.read_text())
        started.terminate()
        assert await started.wait() == -signal.SIGTERM


# metrics


async def test_a_scrape_of_a_live_coordinator(watched: Federation) -> None:
    before = await scrape(watched)
    assert value(before, "fedloom_agents_connected") == 0
    for outcome in RoundOutcome:
        assert value(before, "fedloom_rounds_total", outcome=outcome) == 0
    agent = await watched.enrol("device")
    async with connected(agent) as control:
        details = refusal_pb2.RefusalDetails(reason=refusal_pb2.REASON_DATA_EMPTY)
        await control.send(refusal=control_pb2.StepRefusal(run_id=bytes(16), details=details))
        await control.send(hello=control_pb2.Hello())
        async with refused(Reason.MALFORMED, "second"):
            await control.ended()
    async with connected(agent):
        await watched.connected([agent])
        series = await scrape(watched)
    assert value(series, "fedloom_agents_connected") == 1
    assert value(series, "fedloom_agents_enrolled") == 1
    assert value(series, "fedloom_rpcs_open", rpc="ControlService/Connect") == 1
    assert value(series, "fedloom_rpcs_total", rpc="EnrolmentService/Enrol", outcome="ok") == 1
    refusals = {"rpc": "ControlService/Connect", "outcome": "refused"}
    assert value(series, "fedloom_rpcs_total", **refusals) == 1
    assert value(series, "fedloom_refusals_total", side="agent", reason="DATA_EMPTY") == 1
    assert value(series, "fedloom_refusals_total", side="coordinator", reason="MALFORMED") == 1
    for name in ("fedloom_received_bytes_total", "fedloom_sent_bytes_total"):
        assert value(series, name, service="EnrolmentService") > 100
    assert value(series, "fedloom_store_writes_total", table="agents") >= 1
    assert value(series, "fedloom_store_transaction_seconds_count", kind="write") >= 2
    assert value(series, "process_resident_memory_bytes") > 1e6


async def test_names_follow_the_conventions_and_labels_are_ours(watched: Federation) -> None:
    agent = await watched.enrol("very-private-name")
    watched.start_run("plain", 1)
    async with connected(agent), raw_channel(agent.identity) as channel:
        unknown = channel.unary_unary("/very.private/Method")
        with pytest.raises(grpc.aio.AioRpcError):
            await unknown(b"")
        text = await get(watched, "/metrics")
    assert "private" not in text
    assert "toy" not in text  # the run's name
    allowed: dict[str, set[str]] = {
        "outcome": {*RoundOutcome, "ok", "refused", "cancelled", "failed"},
        "phase": {phase.value for phase in Phase},
        "reason": {*Reason.__members__, "OTHER"},
        "rpc": {rpc.rpartition(".")[2] for rpc in REQUIRED_ROLE} | {"unknown"},
        "service": {rpc.rpartition(".")[2].partition("/")[0] for rpc in REQUIRED_ROLE},
        "side": set(Side),
    }
    families = list(text_string_to_metric_families(text))
    assert {"fedloom_rpcs", "fedloom_runs"} <= {family.name for family in families}
    for family in families:
        assert family.name.startswith(("fedloom_", "process_"))
        assert family.documentation
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_rounds"))  # its unit
        for sample in family.samples:
            for label, found in sample.labels.items():
                assert found in allowed.get(label, {found}), sample
    assert {"fedloom_rpcs", "fedloom_runs"} <= {
        f.name for f in text_string_to_metric_families(text)
    }


async def test_the_page_shows_runs_and_no_markup_of_theirs(watched: Federation) -> None:
    file = watched.folder / "run.toml"
    watched.start_run("plain", 1)
    hostile = file.read_text().replace('"toy"', '"<script>{x}</script>"')
    watched.store.add_run(bytes(16), "<script>{x}", hostile, watched.store.runs()[0].plan, 1.0)
    page = await get(watched, "/")
    assert "toy" in page
    assert "&lt;script&gt;{x}" in page
    assert "<script" not in page


async def test_a_taken_port_stops_no_training(watched: Federation) -> None:
    await watched.stop()
    listen = load_server_config(watched.home).metrics_listen
    port = int(listen.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), capture_logs() as events:
        await watched.start()
        async with enrolment_port(watched) as channel:
            assert await check(channel) == SERVING
    assert any("metrics are off" in event["event"] for event in events)


async def test_a_run_is_measured_and_its_end_is_on_record(watched: Federation) -> None:
    agents = await watched.enrol_all()
    run_id = watched.start_run("sealed", rounds=2)
    for agent in agents:
        agent.start()
    assert (await watched.run_over(run_id)).phase is Phase.COMPLETED
    series = await scrape(watched)
    assert value(series, "fedloom_rounds_total", outcome="finished") == 2
    assert value(series, "fedloom_rounds_total", outcome="failed") == 0
    for step, count in (("add", 6), ("store", 2), ("correct", 2)):
        assert value(series, "fedloom_crypto_seconds_count", step=step) == count
    for phase in ("training", "collecting", "summing", "applying"):
        assert value(series, "fedloom_phase_seconds_count", phase=phase) == 2
    assert value(series, "fedloom_store_writes_total", table="journal") > 10
    log = AuditLog(watched.store.engine)
    deeds = [(entry.action, entry.subject) for entry in log.entries()][-3:]
    of_the_run = ("run started", "run key rotated", "run finished")
    assert deeds == [(action, run_id.hex()) for action in of_the_run]
    assert log.verify() == 2 * len(agents) + 3  # each was invited and enrolled


# the record


async def test_an_enrolment_is_on_record(federation: Federation) -> None:
    await federation.enrol("device")
    log = AuditLog(federation.store.engine)
    invited, entry = log.entries()
    assert (invited.actor, invited.action) == (local_operator(), "agent invited")
    assert (entry.actor, entry.action, entry.subject) == (
        "agent device", "agent enrolled", "device",
    )  # fmt: skip
    assert log.verify() == 2
