"""Authorities that stay offline: devices join, wait, are verified through the chain, and renew."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.authority import authority_is_offline
from coordinator.certificates import Issuer
from edge_agent.enrolment import join
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from tests.integration.federation import PATIENCE_SECONDS, Federation, command, until
from tests.integration.raw import RawControl, raw_channel


class Offline(Federation):
    """A federation whose root lies in another folder, which the coordinator never opens."""

    def __init__(self, folder: Path, strict: bool) -> None:
        self.root = folder / "offline"
        command("ca", "create", self.root, *(["--strict"] if strict else []))
        super().__init__(folder, authority=self.root / "root.pem")
        self.sign()

    def sign(self, *options: str) -> None:
        """Carry the requests to the root and the certificates back."""
        certificates = self.folder / "certificates.json"
        command("ca", "requests", "--home", self.home, "--renew")
        requests = self.home / "requests.json"
        command("ca", "sign", self.root, requests, "--out", certificates, "--yes", *options)
        command("ca", "install", certificates, "--home", self.home)


@asynccontextmanager
async def offline(folder: Path, strict: bool, *options: str) -> AsyncIterator[Offline]:
    """Serve a coordinator whose root is offline; nobody waits as long as people do."""
    found = Offline(folder, strict)
    if options:
        found.sign(*options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordinator.server.SHUTDOWN_SECONDS", 0.1)
        patch.setattr("coordinator.conductor.TICK_SECONDS", 0.05)
        patch.setattr("coordinator.services.enrolment.PENDING_SECONDS", 0.05)
        patch.setattr("edge_agent.session.LAST_BACKOFF_SECONDS", 0.4)
        patch.setattr("edge_agent.enrolment.FIRST_WAIT_SECONDS", 0.05)
        patch.setattr("edge_agent.enrolment.LONGEST_WAIT_SECONDS", 0.05)
        await found.start()
        yield found
        await found.close()


async def test_a_run_below_an_issuing_key_is_verified_up_to_the_root(tmp_path: Path) -> None:
    async with offline(tmp_path, False, "--issuing") as federation:
        assert not authority_is_offline(federation.home)
        agents = await federation.enrol_all()
        for agent in agents:
            assert len(agent.identity.issuers) == 1
            assert len(agent.identity.advertised_exchange_key().issuers) == 1
            assert len(agent.identity.advertised_identity_key().issuers) == 1
            agent.start()
        await federation.connected(agents)
        run_id = federation.start_run("sealed", rounds=1)
        for agent in agents:
            assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
        thetas = [agent.theta(run_id).tobytes() for agent in agents]
        assert len(set(thetas)) == 1


async def test_the_issuing_key_is_replaced_and_nobody_joins_again(tmp_path: Path) -> None:
    async with offline(tmp_path, False, "--issuing") as federation:
        old = await federation.enrol("old")
        await federation.stop()
        federation.sign("--issuing")
        await federation.start()
        new = await federation.enrol("new")
        assert old.identity.issuers != new.identity.issuers
        for agent in (old, new):
            agent.start()
        await federation.connected([old, new])
        for one, other in ((old, new), (new, old)):
            key = other.identity.advertised_exchange_key()
            assert one.identity.verified_exchange_key(other.name, key) == key.public_key


async def test_a_device_waits_for_the_root_and_may_be_interrupted(tmp_path: Path) -> None:
    async with offline(tmp_path, True) as federation:
        assert authority_is_offline(federation.home)
        token, home = federation.invite("device"), tmp_path / "device"
        shown: list[str] = []
        first = asyncio.create_task(join(home, token, shown.append))
        await until("the device to wait", lambda: shown)
        first.cancel()
        await asyncio.wait({first})
        assert not (home / "agent.pem").exists()
        second = asyncio.create_task(join(home, token, shown.append))
        await until("the device to wait again", lambda: len(shown) == 2)
        assert len(set(shown)) == 1  # the same key asks
        [pending] = federation.store.roster.pending()
        assert pending.public_key_sha256.hex() == shown[0]
        assert federation.store.roster.agents() == []
        federation.sign()
        identity = await asyncio.wait_for(second, PATIENCE_SECONDS)
        assert (identity.agent_id, identity.issuers) == ("device", ())
        assert not (home / "request.key").exists()
        async with raw_channel(identity) as channel:
            await RawControl(channel).hello(identity)


async def test_a_device_that_waits_outlives_a_restart_of_the_coordinator(tmp_path: Path) -> None:
    async with offline(tmp_path, True) as federation:
        shown: list[str] = []
        waits = asyncio.create_task(join(tmp_path / "d", federation.invite("d"), shown.append))
        await until("the device to wait", lambda: shown)
        await federation.stop()
        federation.sign()
        await asyncio.sleep(0.2)  # it finds nobody there, and goes on asking
        await federation.start()
        assert (await asyncio.wait_for(waits, PATIENCE_SECONDS)).agent_id == "d"


async def test_a_token_that_is_revoked_ends_the_waiting(tmp_path: Path) -> None:
    async with offline(tmp_path, True) as federation:
        shown: list[str] = []
        waits = asyncio.create_task(join(tmp_path / "d", federation.invite("d"), shown.append))
        await until("the device to wait", lambda: shown)
        [invitation] = federation.store.roster.invitations()
        federation.store.roster.revoke_invitation(invitation.id, 1.0)
        with pytest.raises(Refused) as caught:
            await asyncio.wait_for(waits, PATIENCE_SECONDS)
        assert caught.value.reason is Reason.INVALID_TOKEN


async def test_a_coordinator_that_forges_a_member_is_not_believed(tmp_path: Path) -> None:
    async with offline(tmp_path, True) as federation:
        token = federation.invite("victim")
        waits = asyncio.create_task(join(tmp_path / "victim", token))
        await until("the request", federation.store.roster.pending)
        federation.sign()
        victim = await waits
        ghost = Issuer.new_root(path_length=0)  # all that a coordinator without the root can make
        forged = ghost.agent(victim.key.public_key(), "ghost")
        key = replace(victim, agent_id="ghost", certificate=forged).advertised_exchange_key()
        with pytest.raises(Refused, match="KEY_UNAVAILABLE"):
            victim.verified_exchange_key("ghost", key)
