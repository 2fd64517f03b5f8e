"""What another plan on this device has is neither fetched nor kept a second time."""

import asyncio
import dataclasses
import hashlib
import os
from pathlib import Path

import pytest

from edge_agent.shared_members import link_known_members
from fedloom.artifacts import ArtifactReference
from fedloom.plans import ADAPTER_FILE, BASE_FILE, PLAN_FILE, Plan, PlanMember
from tests.edge_agent.test_resources import _MEMORY, FromMemory, plan_of

BASE, FIRST, SECOND = b"weights of both", b"first", b"second"


def member(name: str, data: bytes) -> PlanMember:
    return PlanMember(name, len(data), hashlib.sha256(data).digest())


def plan_with(adapter: bytes) -> Plan:
    members = (member(ADAPTER_FILE, adapter), member(BASE_FILE, BASE))
    return dataclasses.replace(plan_of(_MEMORY), members=members)


def reference(data: bytes) -> ArtifactReference:
    return ArtifactReference(hashlib.sha256(data).digest(), len(data))


class Recorded(FromMemory):
    """Fetches what is not there, as the real one does."""

    async def download(self, artifact: ArtifactReference, destination: Path) -> None:
        """Write the file."""
        if destination.name not in os.listdir(destination.parent):
            await super().download(artifact, destination)


@pytest.fixture
def transfer() -> Recorded:
    every = [plan_with(FIRST).encode(), plan_with(SECOND).encode(), BASE, FIRST, SECOND]
    return Recorded({reference(data).sha256: data for data in every})


def fetch(transfer: Recorded, adapter: bytes, folder: Path) -> list[int]:
    """Fetch a plan; return the bytes that were missing when its room was looked for."""
    found: list[int] = []

    def require_room(plan: Plan, folder: Path) -> None:
        lacking = [m for m in plan.members if not (folder / m.name).is_file()]
        found.append(sum(m.size_bytes for m in lacking))

    folder.mkdir(parents=True)
    wanted = reference(plan_with(adapter).encode())
    asyncio.run(transfer.download_plan(wanted, folder, require_room))
    return found


def test_a_base_is_fetched_and_kept_once(tmp_path: Path, transfer: Recorded) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert fetch(transfer, FIRST, first) == [len(BASE) + len(FIRST)]
    transfer.fetched.clear()
    assert fetch(transfer, SECOND, second) == [len(SECOND)]
    assert transfer.fetched == [PLAN_FILE, ADAPTER_FILE]
    assert (first / BASE_FILE).samefile(second / BASE_FILE)
    assert not (first / ADAPTER_FILE).samefile(second / ADAPTER_FILE)


def test_a_damaged_file_is_not_shared(tmp_path: Path, transfer: Recorded) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fetch(transfer, FIRST, first)
    (first / BASE_FILE).write_bytes(BASE[::-1])
    fetch(transfer, SECOND, second)
    assert (second / BASE_FILE).read_bytes() == BASE


def test_without_hard_links_it_is_fetched(tmp_path: Path, transfer: Recorded, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    fetch(transfer, FIRST, tmp_path / "first")
    monkeypatch.setattr("os.link", refuse)
    fetch(transfer, SECOND, tmp_path / "second")
    assert (tmp_path / "second" / BASE_FILE).read_bytes() == BASE


def test_what_is_there_stays(tmp_path: Path, transfer: Recorded) -> None:
    fetch(transfer, FIRST, tmp_path / "first")
    second = tmp_path / "second"
    second.mkdir()
    (second / BASE_FILE).write_bytes(b"mine")
    link_known_members(plan_with(SECOND), second)
    assert (second / BASE_FILE).read_bytes() == b"mine"
