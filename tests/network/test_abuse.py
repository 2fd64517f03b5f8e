"""Attacks with real sockets on a server that serves a run meanwhile; the run finishes."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coordinator.conductor import Conductor
from coordinator.services.limits import Admission
from edge_agent.enrolment import join
from fedloom.channels import CLIENT_OPTIONS, ENROLMENT_SERVER_OPTIONS, SERVER_OPTIONS
from fedloom.errors import Reason, refused_from_rpc
from fedloom.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    control_pb2,
    enrolment_pb2,
    enrolment_pb2_grpc,
)
from fedloom.version import PROTOCOL_VERSION
from tests.integration.federation import PATIENCE_SECONDS, Agent, Federation, until
from tests.integration.processes import coordinator
from tests.integration.raw import RawControl, raw_channel, refused
from tests.integration.test_join import enrolment_channel
from tests.network import http2

PORTS = ["control", "enrolment"]
BURST_BYTES = 1 << 16
Attack = Coroutine[Any, Any, None]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what attackers wait for."""
    soon = {"grpc.server_handshake_timeout_ms": 1000, "grpc.max_connection_idle_ms": 1000}
    sooner = soon | {
        "grpc.max_connection_age_ms": 2000,
        "grpc.max_connection_age_grace_ms": 500,
    }
    for name, options, shorter in (
        ("SERVER_OPTIONS", SERVER_OPTIONS, soon),
        ("ENROLMENT_SERVER_OPTIONS", ENROLMENT_SERVER_OPTIONS, sooner),
    ):
        changed = [(key, shorter.get(key, value)) for key, value in options]
        monkeypatch.setattr(f"coordinator.server.{name}", changed)


def port_of(federation: Federation, port: str) -> int:
    """Return the number of a port."""
    return federation.control_port if port == "control" else federation.enrolment_port


async def limited(federation: Federation, **limits: int) -> None:
    """Start the coordinator anew with these limits."""
    await federation.stop()
    lines = [f"{name} = {value}\n" for name, value in limits.items()]
    with (federation.home / "coordinator.toml").open("a") as file:
        file.write("[limits]\n" + "".join(lines))
    await federation.start()


@asynccontextmanager
async def attacked_by(*attacks: Attack) -> AsyncIterator[None]:
    """Let these attacks go on while the block runs; a mistake in them is a test's failure."""
    tasks = [asyncio.create_task(attack) for attack in attacks]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def finishes(federation: Federation, agents: list[Agent], rounds: int = 5) -> None:
    """Run some rounds with these agents, who come while the attack goes on."""
    for agent in agents:
        agent.start()
    run_id = federation.start_run("plain", rounds=rounds, minimum=len(agents))
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    theta = agents[0].theta(run_id)
    assert all(np.array_equal(agent.theta(run_id), theta) for agent in agents)


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a TCP connection."""
    return await asyncio.open_connection("127.0.0.1", port)


def client_hello() -> bytes:
    """Return the first bytes of a TLS handshake."""
    incoming, outgoing = http2.ssl.MemoryBIO(), http2.ssl.MemoryBIO()
    tls = http2.tls_context().wrap_bio(incoming, outgoing)
    with pytest.raises(http2.ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("says", ["nothing", "a byte now and then", "half a handshake"])
async def test_connections_that_never_finish_their_handshake_are_closed(
    federation: Federation, port: str, says: str
) -> None:
    hello, seen = client_hello(), Counter[str]()

    async def hang() -> None:
        while True:
            reader, writer = await connect(port_of(federation, port))
            seen["opened"] += 1
            try:
                if says == "half a handshake":
                    writer.write(hello)
                if says == "a byte now and then":
                    for byte in hello:
                        writer.write(bytes([byte]))
                        await asyncio.sleep(0.1)
                        if reader.at_eof():
                            break
                while await reader.read(BURST_BYTES):
                    pass
            except OSError:
                pass
            finally:
                writer.transport.abort()
            seen["closed by the server"] += 1

    agents = await federation.enrol_all()
    async with attacked_by(*(hang() for _ in range(100))):
        await until("the attack", lambda: seen["opened"] >= 100)
        await finishes(federation, agents)
        await until("the server to close them", lambda: seen["closed by the server"] >= 100)


@pytest.mark.parametrize("port", PORTS)
async def test_garbage_on_a_port_is_no_more_than_a_closed_connection(
    federation: Federation, port: str
) -> None:
    seen = Counter[str]()
    hello = client_hello()

    async def babble(seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - repeatable garbage
        while True:
            garbage = chance.randbytes(chance.choice([1, 5, 100, BURST_BYTES]))
            openings = [b"", hello, hello[:5], b"GET / HTTP/1.1\r\n\r\n", http2.PREFACE]
            reader, writer = await connect(port_of(federation, port))
            try:
                writer.write(chance.choice(openings) + garbage)
                while await reader.read(BURST_BYTES):
                    pass
            except OSError:
                pass
            finally:
                writer.transport.abort()
            seen["closed by the server"] += 1

    agents = await federation.enrol_all()
    async with attacked_by(*(babble(seed) for seed in range(20))):
        await finishes(federation, agents)
        await until("some garbage", lambda: seen["closed by the server"] >= 100)


@pytest.mark.parametrize("port", PORTS)
async def test_a_flood_of_handshakes(federation: Federation, port: str) -> None:
    seen = Counter[str]()

    async def shake_hands() -> None:
        while True:
            try:
                async with http2.peer(port_of(federation, port)):
                    seen["handshakes"] += 1
            except OSError:
                seen["refused"] += 1  # more than `enrolment_connections`, or no certificate

    agents = await federation.enrol_all()
    async with attacked_by(*(shake_hands() for _ in range(20))):
        await finishes(federation, agents)
        await until("the flood", lambda: seen["handshakes"] >= 200)


async def test_connections_above_the_limit_are_closed_and_those_below_live(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all()
    await limited(federation, connections=20)
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    opened = [await connect(federation.control_port) for _ in range(60)]
    ended = [asyncio.create_task(reader.read()) for reader, _ in opened]
    await until("the rest to be closed", lambda: sum(task.done() for task in ended) >= 43)
    # The others stay for as long as a handshake may take; then there is room again.
    await asyncio.wait(ended, timeout=PATIENCE_SECONDS)
    for _, writer in opened:
        writer.transport.abort()
    assert all(task.done() for task in ended)
    await finishes(federation, [*agents[1:]])


HEADERS_OF_A_CALL = http2.call_headers("/fedloom.v1.EnrolmentService/Enrol")
LARGE = http2.field("x-large", "a" * 15_000)


@pytest.mark.parametrize(
    "frames",
    [
        [http2.frame(http2.DATA, 0, 1, b"no stream")],
        [http2.frame(http2.HEADERS, 4, 1, HEADERS_OF_A_CALL, length=0xFFFFFF)],
        [http2.frame(http2.HEADERS, 4, 1, HEADERS_OF_A_CALL + bytes(8_000_000))],
        [http2.frame(http2.SETTINGS, 0, 0, bytes(5))],
        [http2.frame(http2.SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff")],
        [http2.frame(http2.HEADERS, 4, 1, b"\xff" * 100)],
        [http2.frame(http2.HEADERS, 0, 1, HEADERS_OF_A_CALL)]
        + [http2.frame(http2.CONTINUATION, 0, 1, LARGE) for _ in range(1000)],
        [
            http2.frame(http2.HEADERS, 4, 1, HEADERS_OF_A_CALL),
            http2.frame(http2.DATA, 0, 1, b"\0\xff\xff\xff\xff" + bytes(1000)),
        ],
        [http2.frame(http2.HEADERS, 4, 1, HEADERS_OF_A_CALL)]
        + [http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") for _ in range(3)],
        [http2.frame(0xEE, 0xFF, 0, bytes(16_000)) for _ in range(500)],
    ],
    ids=[
        "data without a call",
        "a length that is a lie",
        "a frame of 8 MB",
        "half a setting",
        "a window beyond 2^31",
        "headers that are no HPACK",
        "15 MB of headers",
        "a message of 4 GB",
        "a window that overflows",
        "unknown frames",
    ],
)
async def test_frames_that_are_wrong_or_too_large(
    federation: Federation, frames: list[bytes]
) -> None:
    seen = Counter[str]()

    async def send() -> None:
        while True:
            async with http2.greeted(federation.enrolment_port) as peer:
                await peer.send(*frames)
                async for kind, _, _, _ in peer.received():
                    seen["frames"] += 1
                    if kind in (http2.HEADERS, http2.RST_STREAM, http2.GOAWAY):
                        break  # an answer
            seen["sent"] += 1

    agents = await federation.enrol_all()
    async with attacked_by(send(), send()):
        await finishes(federation, agents, rounds=3)
        await until("an answer, or the end of the connection", lambda: seen["sent"] >= 2)


async def test_calls_that_are_begun_and_reset_at_once(federation: Federation) -> None:
    seen = Counter[str]()

    async def reset_rapidly() -> None:
        while True:
            async with http2.greeted(federation.enrolment_port) as peer:
                for stream in range(1, 2001, 2):
                    begin = http2.frame(http2.HEADERS, 4, stream, HEADERS_OF_A_CALL)
                    cancel = http2.frame(http2.RST_STREAM, 0, stream, b"\0\0\0\x08")
                    if not await peer.send(begin, cancel):
                        break
                    seen["reset"] += 1
                    await asyncio.sleep(0)

    agents = await federation.enrol_all()
    async with attacked_by(reset_rapidly()):
        await finishes(federation, agents)
        await until("the resets", lambda: seen["reset"] >= 2000)


async def test_a_control_stream_that_speaks_as_fast_as_it_can_is_heard_at_its_pace(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, hear = Counter[str](), Conductor.heard_progress

    def counted(self: Conductor, agent: str, *arguments: Any) -> None:
        heard[agent] += 1
        hear(self, agent, *arguments)

    monkeypatch.setattr(Conductor, "heard_progress", counted)
    await limited(federation, messages_per_second=5)
    agents = await federation.enrol_all()
    loud = await federation.enrol("loud")
    loop, said = asyncio.get_running_loop(), Counter[str]()

    async def shout() -> None:
        async with raw_channel(loud.identity) as channel:
            control = RawControl(channel)
            await control.hello(loud.identity, protections=[])  # in no cohort
            while True:
                await control.send(heartbeat=control_pb2.Heartbeat())
                said["loud"] += 1

    began = loop.time()
    async with attacked_by(shout()):
        await until("the first burst", lambda: heard["loud"] >= 50)
        await finishes(federation, agents)
        elapsed = loop.time() - began
        assert heard["loud"] <= 50 + 5 * elapsed + 1
        assert said["loud"] > 10 * heard["loud"], "nothing was held back"


async def test_an_agent_that_reads_nothing_is_given_up_and_no_message_piles_up(
    admission: list[Admission], federation: Federation
) -> None:
    await limited(federation, messages_per_second=10_000)
    agents = await federation.enrol_all()
    deaf = await federation.enrol("deaf")
    conductor = federation.conductor
    assert conductor is not None

    async def provoke() -> None:
        run_id = await until("the run", lambda: conductor._open and conductor._open.run_id)
        wrong = http2.frame(0, 0, 1, _message(_wrong_round(run_id)))
        async with http2.peer(federation.control_port, deaf) as peer:
            # The welcome and no more fits into the window, and it is never opened again.
            settings = http2.frame(http2.SETTINGS, 0, 0, b"\0\4\0\0\0\x20")
            begin = http2.call_headers("/fedloom.v1.ControlService/Connect")
            await peer.send(http2.PREFACE, settings, http2.frame(http2.HEADERS, 4, 1, begin))
            hello = control_pb2.Hello(protocol_version=PROTOCOL_VERSION)
            await peer.send(http2.frame(0, 0, 1, _message(control_pb2.ConnectRequest(hello=hello))))
            for _ in range(10):
                await peer.send(*[wrong] * 50)
                await asyncio.sleep(0.05)
            await asyncio.Event().wait()

    for agent in agents:
        agent.engine.may_finish.clear()
    async with attacked_by(provoke()):
        finishing = asyncio.create_task(finishes(federation, agents))
        await until("the deaf agent", lambda: conductor._sessions.get("deaf"))
        await federation.gone(deaf)  # 256 answers were not read
        assert admission[-1].streams["deaf"] == 1, "its call cannot end: it is blocked in a write"
        for agent in agents:
            agent.engine.may_finish.set()
        await finishing


def _message(message: control_pb2.ConnectRequest) -> bytes:
    """Return a message as gRPC frames it."""
    payload = message.SerializeToString()
    return b"\0" + len(payload).to_bytes(4, "big") + payload


def _wrong_round(run_id: bytes) -> control_pb2.ConnectRequest:
    """Return a step that is answered with a refusal."""
    return control_pb2.ConnectRequest(ready=control_pb2.Ready(run_id=run_id, round=99))


async def test_downloads_that_are_never_read_are_few_and_hold_up_nobody(
    admission: list[Admission], many_parts: int, federation: Federation
) -> None:
    agents = await federation.enrol_all()
    greedy = await federation.enrol("greedy")
    run = federation.start_run("plain", rounds=3, minimum=3)
    plan = federation.run(run).plan.sha256
    adapter = federation.plan.members[0].sha256
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 0)]
    address, credentials = greedy.identity.control_address, greedy.identity.channel_credentials()
    async with grpc.aio.secure_channel(address, credentials, options=small_window) as channel:
        stub = artifact_pb2_grpc.ArtifactServiceStub(channel)
        request = artifact_pb2.DownloadArtifactRequest(sha256=adapter)
        unread = [stub.DownloadArtifact(request) for _ in range(4)]
        for call in unread:
            await call.read()
        async with refused(Reason.BUSY, "transfers_per_agent"):
            async for _ in stub.DownloadArtifact(artifact_pb2.DownloadArtifactRequest(sha256=plan)):
                pass
        for agent in agents:
            agent.start()
        for agent in agents:
            assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
        assert admission[0].transfers == {"greedy": 4}
        for call in unread:
            call.cancel()
    await until("the calls to end", lambda: not admission[0].transfers)


@pytest.mark.parametrize("caller", ["a stranger", "an agent"])
async def test_thousands_of_calls_at_once_are_answered_slowly_and_change_nothing(
    admission: list[Admission], federation: Federation, caller: str
) -> None:
    agents = await federation.enrol_all()
    flooder = await federation.enrol("flooder")
    answers = Counter[str]()

    async def call_once(call: Callable[[], Any]) -> None:
        try:
            await call()
            answers["served"] += 1
        except grpc.aio.AioRpcError as error:
            found = refused_from_rpc(error)
            if found is not None:
                answers[found.reason.name] += 1
                assert found.reason is not Reason.BUSY or (found.retry_after or 0) >= 1

    async def flood() -> None:
        async with AsyncExitStack() as stack:
            if caller == "an agent":
                channel = await stack.enter_async_context(raw_channel(flooder.identity))
                calls = [RawControl(channel).ended for _ in range(3000)]
            else:
                channel = await stack.enter_async_context(enrolment_channel(federation))
                enrol = enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol
                request = enrolment_pb2.EnrolRequest(secret=bytes(32))
                calls = [lambda: enrol(request)] * 3000
            await asyncio.gather(*(call_once(call) for call in calls))

    async with attacked_by(flood()):
        await until("the flood", lambda: admission[0].calls or answers)
        began = asyncio.get_running_loop().time()
        await finishes(federation, agents)
        elapsed = asyncio.get_running_loop().time() - began
    assert answers["BUSY"] <= 16 * (elapsed + 3), "so many calls a second a connection may have"
    await until("its calls to end", lambda: len(admission[0].calls) == len(agents))
    assert admission[0].streams["flooder"] == 0


async def test_a_device_joins_from_where_somebody_guesses(
    federation: Federation, tmp_path: Path
) -> None:
    await limited(federation, joins_per_minute=20)
    token = federation.invite("device")
    answers = Counter[Reason]()

    async def guess() -> None:
        async with enrolment_channel(federation) as channel:
            stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
            while True:
                try:
                    await stub.Enrol(enrolment_pb2.EnrolRequest(secret=bytes(32)))
                except grpc.aio.AioRpcError as error:
                    found = refused_from_rpc(error)
                    assert found is not None
                    answers[found.reason] += 1

    async with attacked_by(guess()):
        await until("the limit", lambda: answers[Reason.BUSY])
    assert sum(answers.values()) - answers[Reason.BUSY] == 20
    # It is told to come back, waits as long as it is told, and gets in.
    assert (await join(tmp_path / "device", token)).agent_id == "device"


async def test_agents_come_back_when_a_busy_coordinator_told_them_to(
    admission: list[Admission], federation: Federation
) -> None:
    await limited(federation, mib_in_flight=1, connections_per_address=2)
    agents = await federation.enrol_all()
    # Three agents, room for two connections of their address: one of them waits and comes again.
    for agent in agents:
        agent.start()
    run_id = federation.start_run("plain", rounds=1, minimum=2)
    await until("two agents", lambda: federation.run(run_id).phase.over)
    assert admission[-1].connections.total() == 2
    [waiting] = [agent for agent in agents if agent.name not in admission[-1].streams]
    [leaving, staying] = [agent for agent in agents if agent is not waiting]
    await leaving.stop()
    await federation.connected([waiting, staying])


async def test_strangers_write_no_lines_into_the_log(
    federation: Federation, tmp_path: Path
) -> None:
    agents = [await federation.enrol("agent")]
    await federation.stop()
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    log = tmp_path / "coordinator.log"
    async with coordinator(federation, log):
        await until("it to serve", lambda: log.is_file() and b'"serving"' in log.read_bytes())
        for port in PORTS:
            for _ in range(50):
                reader, writer = await connect(port_of(federation, port))
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                await reader.read()
                writer.close()
        for agent in agents:
            agent.start()
        await federation.run_over(run_id)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) < 50


def test_the_options_of_channels_are_ones_that_grpc_knows() -> None:
    # gRPC takes any name and says nothing: a misspelt one has no effect.
    library = Path(grpc._cython.cygrpc.__file__).read_bytes()
    for key, _ in [*CLIENT_OPTIONS, *SERVER_OPTIONS, *ENROLMENT_SERVER_OPTIONS]:
        assert key.encode() + b"\0" in library, key
