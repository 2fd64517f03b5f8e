"""A member's promises: on the disk before they are given, whatever interrupts the step."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from coordinator.certificates import Issuer, new_key
from crypto import cohort
from edge_agent import masking
from edge_agent.identity import Identity
from edge_agent.masking import Masking
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2
from tests.integration.engines import Gate

RUN = bytes(range(16))
NAMES = ("a", "b", "c")


class Cohort:
    """Devices that have joined, and what a coordinator tells them of each other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = Issuer.new_root(0)
        self.identities = {name: self._identity(name) for name in NAMES}
        self.members = {name: self.started(name) for name in NAMES}

    def _identity(self, name: str) -> Identity:
        (self._folder / name).mkdir()
        key = new_key()
        return Identity(
            name,
            "coordinator:7070",
            key,
            self._authority.agent(key.public_key(), name),
            self._authority.certificate,
            X25519PrivateKey.generate(),
            Ed25519PrivateKey.generate(),
        )

    def started(self, name: str) -> Masking:
        """Return the member as a new process finds it."""
        return Masking(self._folder / name, self.identities[name], RUN, 3)

    async def formed(self) -> control_pb2.Cohort:
        """Have all advertise."""
        advertised = [cohort.decode(await m.advertise(1, 1)) for m in self.members.values()]
        assert all(isinstance(stated, cohort.Advertisement) for stated in advertised)
        relay = cohort.new_attempt(cohort.AttemptId(RUN, 1, 1), 3, advertised)  # type: ignore[arg-type]
        return control_pb2.Cohort(
            mask_cohort=relay.cohort.encode(),
            identities=[i.advertised_identity_key() for i in self.identities.values()],
        )


@pytest.fixture
def devices(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)


async def test_a_step_that_is_given_up_while_it_is_stored_is_stored_before_that_is_noticed(
    devices: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, member, gate = await devices.formed(), devices.members["a"], Gate()
    write = masking.write_secret

    def held(*arguments: Any) -> None:
        gate.wait()
        write(*arguments)

    monkeypatch.setattr(masking, "write_secret", held)
    step = asyncio.create_task(member.take_up(message))
    await asyncio.to_thread(gate.entered.wait)
    step.cancel()
    done, _ = await asyncio.wait({step}, timeout=0.05)
    assert not done
    gate.open.set()
    await asyncio.wait({step})
    assert step.cancelled()
    assert devices.started("a").digest == member.digest


async def test_a_step_that_is_given_up_while_it_is_computed_has_changed_nothing(
    devices: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, member, gate = await devices.formed(), devices.members["a"], Gate()
    handle, left = cohort.handle_member, asyncio.Event()
    loop = asyncio.get_running_loop()

    def held(*arguments: Any) -> Any:
        gate.wait()
        try:
            return handle(*arguments)
        finally:
            loop.call_soon_threadsafe(left.set)

    monkeypatch.setattr(cohort, "handle_member", held)
    step = asyncio.create_task(member.take_up(message))
    await asyncio.to_thread(gate.entered.wait)
    step.cancel()
    await asyncio.wait({step})
    gate.open.set()
    await left.wait()
    for same in (member, devices.started("a")):
        with pytest.raises(Refused) as refused:
            _ = same.digest
        assert refused.value.reason is Reason.WRONG_ROUND
    boxes = await member.take_up(message)  # asked again
    assert boxes == await devices.started("a").take_up(message)


async def test_a_device_that_dies_between_its_two_files_starts_again(
    devices: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, write = await devices.formed(), masking.write_secret

    def full(*_: Any) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(masking, "write_secret", full)
    with pytest.raises(OSError, match="power"):
        await devices.members["a"].take_up(message)
    monkeypatch.setattr(masking, "write_secret", write)
    again = devices.started("a")
    boxes = await again.take_up(message)
    assert await devices.started("a").take_up(message) == boxes


async def test_a_cohort_that_is_refused_leaves_the_identities_of_the_open_one(
    devices: Cohort,
) -> None:
    message, member = await devices.formed(), devices.members["a"]
    boxes = await member.take_up(message)
    stated = cohort.decode(message.mask_cohort)
    assert isinstance(stated, cohort.Cohort)
    other = control_pb2.Cohort(identities=message.identities[:2])
    fewer = cohort.Cohort(stated.attempt, 2, stated.members[:2])
    other.mask_cohort = fewer.encode()
    with pytest.raises(Refused) as refused:
        await member.take_up(other)
    assert refused.value.reason is Reason.COHORT_REFUSED
    assert set(member._keys) == set(NAMES)
    assert await devices.started("a").take_up(message) == boxes
