"""Certificates renew by themselves, and at no moment is a device without one that is good."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from edge_agent.enrolment import join, renew
from edge_agent.identity import Identity, certificate_request, load_identity
from fedloom.chains import needs_renewal
from fedloom.errors import Reason, Refused
from fedloom.renewals import sign_renewal
from fedloom.v1 import control_pb2, enrolment_pb2, enrolment_pb2_grpc
from tests.coordinator.holders import DER, Holder
from tests.integration.federation import Agent, Federation, until
from tests.integration.raw import RawControl, raw_channel, refused
from tests.integration.test_authorities import offline

ENDING, ENDED = 0.25, -0.5  # days; certificates begin a day before they are made


async def enrol(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, days: float = ENDING
) -> Agent:
    """Let a device join whose certificate ends soon; later ones last as long as usual."""
    with monkeypatch.context() as patch:
        patch.setattr("coordinator.certificates.AGENT_DAYS", days)
        return await federation.enrol("device")


async def is_let_in(identity: Identity) -> bool:
    """Whether the coordinator welcomes this identity."""
    try:
        async with raw_channel(identity) as channel:
            await RawControl(channel).hello(identity)
    except AssertionError:
        return False
    return True


async def test_a_session_renews_its_certificate_with_a_new_key(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await enrol(federation, monkeypatch)
    old = agent.identity
    assert needs_renewal(old.certificate, datetime.now(UTC))
    agent.start()
    await until("a renewal", lambda: load_identity(agent.home).certificate != old.certificate)
    new = load_identity(agent.home)
    assert new.agent_id == old.agent_id
    assert new.key.public_key() != old.key.public_key()
    assert not needs_renewal(new.certificate, datetime.now(UTC))
    assert (agent.home / "agent.pem").stat().st_mode & 0o777 == 0o600
    assert not (agent.home / "request.key").exists()
    # The session goes on with the new key, and the old one is shut out.
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert agent.theta(run_id).size
    async with raw_channel(old) as channel, refused(Reason.NOT_PERMITTED):
        await RawControl(channel).ended()
    ends = federation.store.roster.agent("device").certificate_until
    assert ends == new.certificate.not_valid_after_utc.timestamp()


async def test_a_certificate_that_is_young_is_left_alone(federation: Federation) -> None:
    agent = await federation.enrol("device")
    agent.start()
    await federation.connected([agent])
    assert load_identity(agent.home).certificate == agent.identity.certificate
    assert not (agent.home / "request.key").exists()


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(step: int) -> Iterator[list[str]]:
    """Let the process end before the so-many-th change of its files; tells which were made."""
    made: list[str] = []

    def counted(change: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Path, *arguments: Any, **options: Any) -> Any:
            if len(made) == step:
                raise Killed
            made.append(f"{change} {path.name}")
            return real(path, *arguments, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for change in ("unlink", "replace", "write_bytes", "write_text"):
            patch.setattr(Path, change, counted(change, getattr(Path, change)))
        yield made


async def test_a_device_that_dies_anywhere_in_a_renewal_has_a_key_that_is_good(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await enrol(federation, monkeypatch)
    whole: list[str] = []
    for step in range(100):
        before = load_identity(agent.home)
        with killed_at(step) as made:
            try:
                await renew(agent.home, before)
            except Killed:
                pass
            else:
                whole = made
        # Key and certificate fit each other, and the coordinator knows them.
        assert await is_let_in(load_identity(agent.home))
        if whole:
            break
    assert "replace agent.pem.part" in whole
    assert len(whole) == step >= 3
    assert not (agent.home / "request.key").exists()


async def test_the_old_key_is_good_until_the_new_one_is_used(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await enrol(federation, monkeypatch)
    old = agent.identity
    new = await renew(agent.home, old)
    assert await is_let_in(old)
    assert await is_let_in(new)
    async with raw_channel(old) as channel, refused(Reason.NOT_PERMITTED):
        await RawControl(channel).ended()


async def test_a_session_is_not_ended_by_a_renewal_that_fails(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await enrol(federation, monkeypatch)
    asked = asyncio.Event()

    async def fails(home: Path, identity: Identity) -> Identity:
        asked.set()
        raise Refused(Reason.ENROLMENT_PENDING, "not yet")

    monkeypatch.setattr("edge_agent.enrolment.renew", fails)
    agent.start()
    await asked.wait()
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    await agent.finished()
    assert agent.theta(run_id).size


async def test_a_renewal_waits_for_a_root_that_is_offline_and_is_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with offline(tmp_path, True) as federation:
        enrolling = asyncio.create_task(enrol(federation, monkeypatch))
        await until("the request", federation.store.roster.pending)
        federation.sign()
        agent = await enrolling
        for _ in range(2):
            with pytest.raises(Refused) as caught:
                await renew(agent.home, agent.identity)
            assert caught.value.reason is Reason.ENROLMENT_PENDING
        [pending] = federation.store.roster.pending()
        assert pending.former_key_signature
        assert await is_let_in(agent.identity)
        federation.sign()  # `--yes`: it would leave out a key that nobody vouches for
        new = await renew(agent.home, agent.identity)
        assert new.key.public_key() != agent.identity.key.public_key()
        assert await is_let_in(new)


@pytest.mark.parametrize("signature", ["none", "its own", "of another request"])
async def test_a_new_key_that_the_old_one_does_not_vouch_for_is_refused(
    federation: Federation, signature: str
) -> None:
    agent = await federation.enrol("device")
    stranger = Holder()
    request = stranger.request_der
    signatures = {
        "none": b"",
        "its own": sign_renewal(stranger.key, request),
        "of another request": sign_renewal(agent.identity.key, Holder().request_der),
    }
    async with raw_channel(agent.identity) as channel:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        message = enrolment_pb2.RenewRequest(
            certificate_request=request, former_key_signature=signatures[signature]
        )
        async with refused(Reason.MALFORMED, "signed by the old one"):
            await stub.Renew(message)


async def test_the_same_key_may_be_renewed_without_a_signature(federation: Federation) -> None:
    agent = await federation.enrol("device")
    request = certificate_request(agent.identity.key).public_bytes(DER)
    async with raw_channel(agent.identity) as channel:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        answer = await stub.Renew(enrolment_pb2.RenewRequest(certificate_request=request))
    issued = x509.load_der_x509_certificate(answer.certificate)
    assert issued.public_key() == agent.identity.key.public_key()
    assert issued != agent.identity.certificate
    assert await is_let_in(agent.identity)


async def test_an_expired_certificate_is_named_and_nothing_is_tried(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await enrol(federation, monkeypatch, days=ENDED)
    agent.start()
    error = await agent.ended()
    assert isinstance(error, Refused)
    assert error.reason is Reason.CERTIFICATE_EXPIRED
    assert "join again" in error.subject
    token = federation.invite("device")
    agent.identity = await join(agent.home, token)
    agent.start()
    await federation.connected([agent])


async def test_a_certificate_that_ends_while_the_agent_runs_is_named(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await federation.enrol("device")
    agent.start()
    await federation.connected([agent])

    def ended(self: Identity, now: datetime) -> None:
        raise Refused(Reason.CERTIFICATE_EXPIRED, "ended")

    monkeypatch.setattr(Identity, "require_valid", ended)
    await federation.stop()  # the next connection asks
    error = await agent.ended()
    assert isinstance(error, Refused)
    assert error.reason is Reason.CERTIFICATE_EXPIRED
