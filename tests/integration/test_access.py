"""Who may call what, over real TLS: each caller, each RPC, and one that no table knows."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from coordinator.authority import Authority
from coordinator.services.access import REQUIRED_ROLE, AccessInterceptor, Role
from fedloom.errors import Reason, refused_from_rpc
from tests.coordinator.holders import DER, Holder
from tests.integration.federation import PATIENCE_SECONDS, Federation
from tests.integration.raw import RawControl, raw_channel, refused

CALLERS = {
    "nobody": set(),
    "agent": {Role.AGENT},
    "operator": {Role.OPERATOR},
    "stranger": set(),  # an agent's certificate in a name that is not enrolled
    "replaced": set(),  # an enrolled name, an older key
    "banned": set(),
}


ATTEMPTS = 5
STRANGERS_SERVICES = {"fedloom.v1.EnrolmentService", "grpc.health.v1.Health"}  # and no other


async def reason_of(channel: grpc.aio.Channel, rpc: str) -> Reason | grpc.StatusCode:
    """Call with an empty message and return the refusal's reason, or how the call ended.

    A call that is refused while it still writes sometimes ends as INTERNAL without the server's
    status: gRPC's client says so of its own failed write. An agent tries again then; so does this.
    """
    for _ in range(ATTEMPTS - 1):
        found = await _reason_of_one_call(channel, rpc)
        if found is not grpc.StatusCode.INTERNAL:
            return found
    return await _reason_of_one_call(channel, rpc)


async def _reason_of_one_call(channel: grpc.aio.Channel, rpc: str) -> Reason | grpc.StatusCode:
    call = channel.stream_stream(rpc)()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await call.write(b"")
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
            await call.wait_for_connection()
            code = await call.code()
    except grpc.aio.AioRpcError as error:
        return _reason(error)
    except asyncio.InvalidStateError:
        code = await call.code()
    error = grpc.aio.AioRpcError(
        code, await call.initial_metadata(), await call.trailing_metadata()
    )
    return _reason(error)


def _reason(error: grpc.aio.AioRpcError) -> Reason | grpc.StatusCode:
    found = refused_from_rpc(error)
    return error.code() if found is None else found.reason


def channel_of(federation: Federation, holder: Holder | None) -> grpc.aio.Channel:
    """Connect as this holder; without one, to the port that asks for no certificate."""
    authority = (federation.home / "authority.pem").read_bytes()
    if holder is None:
        credentials = grpc.ssl_channel_credentials(authority)
        return grpc.aio.secure_channel(f"127.0.0.1:{federation.enrolment_port}", credentials)
    credentials = grpc.ssl_channel_credentials(authority, holder.key_pem, holder.chain_pem)
    return grpc.aio.secure_channel(f"127.0.0.1:{federation.control_port}", credentials)


async def holder_of(federation: Federation, caller: str) -> Holder | None:
    """Make what this caller has."""
    authority = Authority.load(federation.home)
    fresh = Holder()
    match caller:
        case "nobody":
            return None
        case "operator":
            return Holder(fresh.key, authority.issue_operator(fresh.request, "alice"))
        case "stranger":
            return Holder(fresh.key, authority.issue_agent(fresh.request, "stranger"))
    identity = (await federation.enrol(caller)).identity
    if caller == "replaced":
        await federation.enrol(caller)
    if caller == "banned":
        federation.store.roster.ban(caller, "stolen", 1.0)
    return Holder(identity.key, (identity.certificate.public_bytes(DER),))


# INTERNAL: the server resets the stream of an unknown call while the client still writes to it.
NOT_HERE = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


@pytest.mark.parametrize("caller", CALLERS)
async def test_each_caller_is_let_in_where_the_table_says(
    federation: Federation, caller: str
) -> None:
    roles = CALLERS[caller] | {Role.ANYONE}
    served = {rpc: role for rpc, role in REQUIRED_ROLE.items() if "AdminService" not in rpc}
    async with channel_of(federation, await holder_of(federation, caller)) as channel:
        found = {rpc: await reason_of(channel, rpc) for rpc in served}
    for rpc, role in served.items():
        if caller == "nobody" and rpc.split("/")[1] not in STRANGERS_SERVICES:
            assert found[rpc] in NOT_HERE, rpc
            continue
        kept_out = Reason.BANNED if caller == "banned" else Reason.NOT_PERMITTED
        assert (found[rpc] is kept_out) == (role not in roles), (rpc, found[rpc])


@pytest.mark.parametrize("caller", CALLERS)
async def test_what_is_the_operators_is_nobody_elses(
    federation: Federation, caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = await holder_of(federation, caller)
    rpc = "/fedloom.v1.EnrolmentService/Renew"  # on both ports
    monkeypatch.setitem(REQUIRED_ROLE, rpc, Role.OPERATOR)
    async with channel_of(federation, holder) as channel:
        found = await reason_of(channel, rpc)
    assert (found is Reason.NOT_PERMITTED) == (caller != "operator")


@asynccontextmanager
async def serving_forgotten(federation: Federation, target: str) -> AsyncIterator[None]:
    """Serve RPCs that no table knows, of every kind, behind the interceptor."""

    async def unary(request: bytes, context: object) -> bytes:
        raise AssertionError("entered")

    async def stream(request: object, context: object) -> AsyncIterator[bytes]:
        raise AssertionError("entered")
        yield b""

    server = grpc.aio.server(interceptors=[AccessInterceptor(federation.store.roster)])
    handlers = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(unary),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(stream),
        "StreamStream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("forgotten", handlers),))
    server.add_insecure_port(target)
    await server.start()
    yield
    await server.stop(None)


@pytest.mark.parametrize("kind", ["UnaryUnary", "StreamUnary", "UnaryStream", "StreamStream"])
async def test_an_rpc_that_is_not_in_the_table_is_refused_to_everybody(
    federation: Federation, tmp_path: Path, kind: str
) -> None:
    target = f"unix:{tmp_path / 'socket'}"  # where even the operator's RPCs are open
    async with serving_forgotten(federation, target), grpc.aio.insecure_channel(target) as channel:
        assert await reason_of(channel, f"/forgotten/{kind}") is Reason.NOT_PERMITTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/forgotten/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_unix_socket_proves_the_operator_and_no_agent(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"unix:{tmp_path / 'socket'}"
    async with serving_forgotten(federation, target), grpc.aio.insecure_channel(target) as channel:
        rpc = "/forgotten/UnaryUnary"
        monkeypatch.setitem(REQUIRED_ROLE, rpc, Role.OPERATOR)
        with pytest.raises(grpc.aio.AioRpcError, match="entered"):
            await channel.unary_unary(rpc)(b"")
        monkeypatch.setitem(REQUIRED_ROLE, rpc, Role.AGENT)
        assert await reason_of(channel, rpc) is Reason.NOT_PERMITTED


async def test_a_ban_ends_the_stream_that_is_open_and_says_why(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.services.control.STANDING_SECONDS", 0.0)
    agent = await federation.enrol("device")
    async with raw_channel(agent.identity) as channel:
        control = RawControl(channel)
        await control.hello(agent.identity)
        assert federation.store.roster.agent("device").last_seen is not None
        federation.store.roster.ban("device", "stolen last week", 1.0)
        await control.send(heartbeat={})
        async with refused(Reason.BANNED, "stolen last week"):
            await control.ended()


async def test_a_banned_agent_stops_and_repeats_the_operators_words(
    federation: Federation,
) -> None:
    agent = await federation.enrol("device")
    federation.store.roster.ban("device", "stolen last week", 1.0)
    agent.start()
    assert "stolen last week" in str(await agent.ended())
    federation.store.roster.unban("device")
    agent.start()
    await federation.connected([agent])


async def test_a_certificate_that_ends_while_connected_is_refused(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await federation.enrol("device")
    async with raw_channel(agent.identity) as channel:
        await RawControl(channel).hello(agent.identity)
        ended = agent.identity.certificate.not_valid_before_utc
        monkeypatch.setattr("coordinator.services.access.Peer.until", ended)
        rpc = "/fedloom.v1.ArtifactService/DownloadArtifact"
        assert await reason_of(channel, rpc) is Reason.CERTIFICATE_EXPIRED
