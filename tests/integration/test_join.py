"""Who may join and who may call: tokens, certificates and ports that are not the right ones."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from edge_agent.connection import CLOSED_TIMES, Closings, Unreachable
from edge_agent.enrolment import join
from fedloom.errors import Reason, Refused
from fedloom.tokens import EnrolmentToken, parse_token
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc
from tests.integration.federation import PATIENCE_SECONDS, Federation, command, free_ports, until
from tests.integration.raw import RawControl, raw_channel, refused


async def refuses_to_join(home: Path, token: str) -> Refused:
    """Expect a refusal; a device that was refused is not a member of anything."""
    with pytest.raises(Refused) as caught:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await join(home, token)
    assert not (home / "agent.pem").exists()
    return caught.value


def names(federation: Federation) -> list[str]:
    """Return who is enrolled."""
    return [agent.agent_id for agent in federation.store.roster.agents()]


def altered(token: str, **fields: bytes | str) -> str:
    """Return the token with other fields."""
    found = parse_token(token)
    values = {
        "address": found.address,
        "secret": found.secret,
        "authority_certificate": found.authority_certificate,
    }
    return EnrolmentToken(**(values | fields)).encode()  # type: ignore[arg-type]


@pytest.mark.parametrize("garbage", ["", "fl1_", "fl1_!!!!", "fl1_AAAA", "no token", "fl1_" * 4096])
async def test_a_garbage_token_is_refused(
    federation: Federation, tmp_path: Path, garbage: str
) -> None:
    refusal = await refuses_to_join(tmp_path / "device", garbage)
    assert refusal.reason is Reason.INVALID_TOKEN
    assert not (tmp_path / "device").exists()


async def test_a_token_with_a_wrong_secret_or_without_an_authority_is_refused(
    federation: Federation, tmp_path: Path
) -> None:
    token = federation.invite("device")
    for wrong in (altered(token, secret=bytes(32)), altered(token, authority_certificate=b"x")):
        refusal = await refuses_to_join(tmp_path / "device", wrong)
        assert refusal.reason is Reason.INVALID_TOKEN
    assert federation.store.roster.agents() == []


async def test_an_expired_token_is_refused(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = federation.invite("device", hours=1)
    monkeypatch.setattr("coordinator.services.enrolment.time.time", lambda: 4e9)
    refusal = await refuses_to_join(tmp_path / "device", token)
    assert refusal.reason is Reason.TOKEN_EXPIRED


async def test_a_used_token_serves_its_own_device_again_and_no_other(
    federation: Federation, tmp_path: Path
) -> None:
    token = federation.invite("device")
    first = await join(tmp_path / "device", token)
    again = await join(tmp_path / "device", token)
    assert first.agent_id == again.agent_id == "device"
    refusal = await refuses_to_join(tmp_path / "thief", token)
    assert refusal.reason is Reason.INVALID_TOKEN
    assert names(federation) == ["device"]


async def test_a_server_of_another_authority_gets_no_secret_and_a_clear_message(
    federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Federation(tmp_path / "other")
    foreign = parse_token(other.invite("device")).authority_certificate
    token = altered(federation.invite("device"), authority_certificate=foreign)
    with pytest.raises(Unreachable, match="not of the authority") as caught:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await join(tmp_path / "device", token)
    assert caught.value.hopeless
    await other.close()


async def test_a_port_without_tls_is_named(federation: Federation, tmp_path: Path) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    token = altered(federation.invite("device"), address=f"127.0.0.1:{port}")
    with pytest.raises(Unreachable, match="does not speak TLS"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await join(tmp_path / "device", token)
    await server.stop(None)


async def test_nobody_there_is_said_at_once(federation: Federation, tmp_path: Path) -> None:
    [port] = free_ports(1)
    token = altered(federation.invite("device"), address=f"127.0.0.1:{port}")
    with pytest.raises(Unreachable, match="UNAVAILABLE"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await join(tmp_path / "device", token)


@pytest.mark.parametrize("request_bytes", [b"", b"garbage", b"\x30" * 5000])
async def test_a_garbage_signing_request_uses_nothing_up(
    federation: Federation, tmp_path: Path, request_bytes: bytes
) -> None:
    text = federation.invite("device")
    token = parse_token(text)
    async with enrolment_channel(federation) as channel:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        request = enrolment_pb2.EnrolRequest(secret=token.secret, certificate_request=request_bytes)
        async with refused(Reason.MALFORMED):
            await stub.Enrol(request)
    assert (await join(tmp_path / "device", text)).agent_id == "device"


def enrolment_channel(federation: Federation) -> grpc.aio.Channel:
    """Open a channel to the enrolment port, without a client certificate."""
    pem = (federation.home / "authority.pem").read_bytes()
    return grpc.aio.secure_channel(
        f"127.0.0.1:{federation.enrolment_port}", grpc.ssl_channel_credentials(pem)
    )


async def test_the_enrolment_port_lets_nobody_control(federation: Federation) -> None:
    member = (await federation.enrol("member")).identity
    async with enrolment_channel(federation) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await RawControl(channel).hello(member)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # there is no such service


async def test_an_agent_of_a_foreign_authority_is_not_let_in(
    federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Federation(tmp_path / "other")
    await other.start()
    foreign = await other.enrol("member")
    member = await federation.enrol("member")
    disguised = replace(foreign.identity, authority=member.identity.authority)
    disguised = replace(disguised, control_address=member.identity.control_address)
    async with raw_channel(disguised) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await RawControl(channel).hello(disguised)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # by TLS, before any service
    await other.close()


async def test_a_device_that_enrols_again_shuts_its_old_key_out(
    federation: Federation, tmp_path: Path
) -> None:
    old = await federation.enrol("device")
    new = await federation.enrol("device")
    old.start()
    error = await old.ended()
    assert isinstance(error, Refused)
    assert error.reason is Reason.NOT_PERMITTED
    async with raw_channel(new.identity) as channel:
        await RawControl(channel).hello(new.identity)


async def test_a_certificate_of_nobody_enrolled_is_refused(federation: Federation) -> None:
    agent = await federation.enrol("device")
    federation.store.close()
    (federation.home / "store.sqlite").rename(federation.home / "lost.sqlite")
    await federation.stop()
    for leftover in federation.home.glob("store.sqlite-*"):
        leftover.unlink()
    await federation.start()
    agent.start()
    error = await agent.ended()
    assert isinstance(error, Refused)
    assert error.reason is Reason.NOT_PERMITTED


async def until_logged(records: list[Any], text: str) -> None:
    """Wait until an agent says why it connects again."""
    await until(text, lambda: any(text in str(record.get("cause")) for record in records))


async def test_an_agent_of_a_foreign_authority_is_told_what_may_be_wrong(
    federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Federation(tmp_path / "other")
    await other.start()
    foreign, member = await other.enrol("member"), await federation.enrol("member")
    await other.close()
    foreign.identity = replace(
        foreign.identity,
        authority=member.identity.authority,
        control_address=member.identity.control_address,
    )
    with capture_logs() as records:
        foreign.start()
        await until_logged(records, "may not know the authority")
    told = [str(record["cause"]) for record in records if "cause" in record]
    assert not any("may not know" in cause for cause in told[: CLOSED_TIMES - 1])
    await foreign.stop()


async def test_a_coordinator_that_is_away_is_not_taken_for_a_foreign_one(
    federation: Federation,
) -> None:
    agent = await federation.enrol("device")
    await federation.stop()
    with capture_logs() as records:
        agent.start()
        await until("some attempts", lambda: len(records) > CLOSED_TIMES + 1)
    assert not any("may not know" in str(record.get("cause")) for record in records)
    await federation.start()
    await federation.connected([agent])


async def test_a_closed_connection_is_explained_when_it_happens_again_and_again() -> None:
    def failed(details: str) -> grpc.aio.AioRpcError:
        metadata = grpc.aio.Metadata()
        return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, details)

    closed = failed("failed to connect to all addresses; last error: ipv4:1.2.3.4:5: Socket closed")
    gone = failed("failed to connect to all addresses; last error: Connection refused")
    closings = Closings()
    errors = (closed, closed, gone, closed, closed, closed)
    said = [str(closings.explained(error, "c:1")) for error in errors]
    assert ["may not know" in text for text in said] == [False] * 5 + [True]


@pytest.fixture
async def over_ipv6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Federation]:
    """Return a coordinator that listens on [::1] alone."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr("coordinator.server.SHUTDOWN_SECONDS", 0.1)
    monkeypatch.setattr("coordinator.conductor.TICK_SECONDS", 0.05)
    found = Federation(tmp_path, host="::1")
    await found.start()
    yield found
    await found.close()


async def test_everything_works_over_ipv6(over_ipv6: Federation) -> None:
    token = over_ipv6.invite("device")
    assert parse_token(token).address == f"[::1]:{over_ipv6.enrolment_port}"
    agent = await over_ipv6.enrol("member")
    assert agent.identity.control_address == f"[::1]:{over_ipv6.control_port}"
    agent.start()
    run_id = over_ipv6.start_run("plain", rounds=1, minimum=1)
    await agent.finished()
    assert agent.theta(run_id).size


async def test_an_address_typed_in_brackets_is_the_same(tmp_path: Path) -> None:
    command("init", "--home", tmp_path / "home", "--address", "[::1]")
    token = command("invite", "--name", "device", "--home", tmp_path / "home")
    assert parse_token(token).address == "[::1]:7072"


async def test_one_token_lets_several_devices_in(federation: Federation, tmp_path: Path) -> None:
    token = command("invite", "--name", "pi", "--uses", "2", "--home", federation.home)
    first = await join(tmp_path / "a", token)
    again = await join(tmp_path / "a", token)
    second = await join(tmp_path / "b", token)
    assert [found.agent_id for found in (first, again, second)] == ["pi-1", "pi-1", "pi-2"]
    assert (await refuses_to_join(tmp_path / "c", token)).reason is Reason.INVALID_TOKEN


async def test_a_revoked_token_lets_nobody_in_and_puts_nobody_out(
    federation: Federation, tmp_path: Path
) -> None:
    token = command("invite", "--name", "pi", "--uses", "2", "--home", federation.home)
    first = await join(tmp_path / "a", token)
    [invitation] = federation.store.roster.invitations()
    federation.store.roster.revoke_invitation(invitation.id, 1.0)
    assert (await refuses_to_join(tmp_path / "b", token)).reason is Reason.INVALID_TOKEN
    async with raw_channel(first) as channel:
        await RawControl(channel).hello(first)


async def test_an_answer_that_was_lost_is_given_again(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = federation.invite("device")

    def lost(*arguments: object) -> None:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr("edge_agent.enrolment.save_membership", lost)
        with pytest.raises(ConnectionResetError):
            await join(tmp_path / "device", token)
    monkeypatch.setattr("coordinator.services.enrolment.time.time", lambda: 4e9)  # the token ends
    assert (await join(tmp_path / "device", token)).agent_id == "device"
    assert names(federation) == ["device"]


async def test_a_banned_device_cannot_join_again_under_its_name(
    federation: Federation, tmp_path: Path
) -> None:
    await federation.enrol("device")
    token = federation.invite("device")
    federation.store.roster.ban("device", "stolen last week", 1.0)
    refusal = await refuses_to_join(tmp_path / "device", token)
    assert (refusal.reason, refusal.subject) == (Reason.BANNED, "stolen last week")
