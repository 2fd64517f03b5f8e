"""A full disk: nothing half is shown, what is stored can be read, and room is all that it takes."""

import errno
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from coordinator.database import open_database
from coordinator.faults import StorageFault, StorageFull, is_full
from coordinator.published import PublishedFolder
from coordinator.round_sum import Upload
from coordinator.run_state import Phase
from coordinator.server import keep_conducting
from coordinator.services import artifacts
from coordinator.services.artifacts import ArtifactService
from coordinator.services.limits import Admission, Limits
from coordinator.store import JournalEntry, Store
from fedloom.artifacts import SENT_PART_BYTES, ArtifactReference, PartialFile
from fedloom.errors import Reason, refused_from_rpc
from fedloom.v1 import artifact_pb2
from tests.coordinator.postgresql import PostgresServer
from tests.small_disk import SmallDisk, mounted

KIBIBYTES = 1024
UPDATE = bytes(range(256)) * (2 * KIBIBYTES)  # 512 KiB
ARTIFACT = ArtifactReference(hashlib.sha256(UPDATE).digest(), len(UPDATE))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", KIBIBYTES) as found:
        yield found


def test_what_does_not_fit_is_not_published(disk: SmallDisk, tmp_path: Path) -> None:
    published = PublishedFolder(disk.folder / "artifacts")
    small = published.put(iter([b"sum"]))
    source = tmp_path / "source"
    source.write_bytes(bytes(2 * KIBIBYTES * 1024))
    large = ArtifactReference(hashlib.sha256(source.read_bytes()).digest(), source.stat().st_size)
    with pytest.raises(StorageFull, match="No space left"):
        published.put(iter([bytes(1000)] * 2 * KIBIBYTES))
    with pytest.raises(StorageFull, match="No space left"):
        published.put_verified(source, large)
    assert [path.name for path in published.folder.iterdir()] == [small.sha256.hex()]
    assert b"".join(published.parts(small.sha256)) == b"sum"
    assert published.put(iter([UPDATE])) == ARTIFACT


@pytest.mark.parametrize("size", [1, 8191, 8193, SENT_PART_BYTES])
def test_an_artifact_that_does_not_fit_goes_on_once_there_is_room(
    disk: SmallDisk, size: int
) -> None:
    path, destination = disk.folder / "a.part", disk.folder / "a"
    with PartialFile(path, ARTIFACT) as partial:
        partial.append(UPDATE[:SENT_PART_BYTES])
        disk.fill()
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what counts
            partial.append(UPDATE[SENT_PART_BYTES:][:size])
        assert is_full(caught.value)
    disk.free()
    with PartialFile(path, ARTIFACT) as partial:
        assert SENT_PART_BYTES <= partial.size_bytes < SENT_PART_BYTES + size
        partial.append(UPDATE[partial.size_bytes :])
        partial.finish(destination)
    assert destination.read_bytes() == UPDATE


def append_for_ever(store: Store, run_id: bytes) -> None:
    """Write; the database may have room in the page that it has begun."""
    while True:
        store.append_journal(run_id, JournalEntry(0.0, "kind", bytes(4096)))


def test_a_full_disk_changes_nothing_in_the_store_and_hides_nothing(disk: SmallDisk) -> None:
    store = Store(disk.folder / "store.sqlite")
    run_id = bytes(16)
    store.add_run(run_id, "run", "", ARTIFACT, now=0.0)
    disk.fill()
    with pytest.raises(StorageFull, match="no room") as caught:
        append_for_ever(store, run_id)
    written = len(store.journal(run_id))
    assert caught.value.where == str(disk.folder / "store.sqlite")
    with pytest.raises(StorageFull):
        append_for_ever(store, run_id)
    with pytest.raises(StorageFull):
        store.update_run(run_id, Phase.TRAINING, 1, 1)
    assert store.run(run_id).phase is Phase.GATHERING
    assert len(store.journal(run_id)) == written
    disk.free()
    store.update_run(run_id, Phase.TRAINING, 1, 1)
    assert store.run(run_id).phase is Phase.TRAINING
    store.close()
    engine = sa.create_engine(f"sqlite:///{disk.folder / 'store.sqlite'}")
    with engine.connect() as db:
        assert db.execute(sa.text("PRAGMA integrity_check")).scalar_one() == "ok"
    engine.dispose()


def test_a_server_without_room_is_full_too(postgresql: PostgresServer) -> None:
    with postgresql.database() as url:
        engine = open_database(url)
        statement = "DO $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = 'disk_full'; END $$"
        with engine.connect() as db, pytest.raises(StorageFull) as caught:
            db.execute(sa.text(statement))
        engine.dispose()
    assert caught.value.errno == errno.ENOSPC


class Rounds:
    """Wants one upload, and keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def upload_path(self, upload: Upload) -> Path | None:
        """Return where it is spooled."""
        return self.path

    async def accept_upload(self, upload: Upload, path: Path) -> None:
        """Keep it."""

    def count_traffic(self, agent: str, *, sent: int = 0, received: int = 0) -> None:
        """Count nothing."""


class Aborted(grpc.aio.AioRpcError):
    """How the RPC ended."""


class Context:
    """What a service needs of gRPC."""

    def __init__(self) -> None:
        self.sent: list[artifact_pb2.DownloadArtifactResponse] = []

    def peer(self) -> str:
        """Return whose connection it is."""
        return "ipv4:192.0.2.7:1"

    async def write(self, answer: artifact_pb2.DownloadArtifactResponse) -> None:
        """Send an answer."""
        self.sent.append(answer)

    async def abort(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        """End the RPC."""
        raise Aborted(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


async def requests() -> AsyncIterator[artifact_pb2.UploadArtifactRequest]:
    header = artifact_pb2.UploadHeader(sha256=ARTIFACT.sha256, size_bytes=ARTIFACT.size_bytes)
    yield artifact_pb2.UploadArtifactRequest(header=header)
    for start in range(0, len(UPDATE), SENT_PART_BYTES):
        yield artifact_pb2.UploadArtifactRequest(part=UPDATE[start : start + SENT_PART_BYTES])


async def test_a_full_disk_refuses_uploads_with_its_reason_and_serves_downloads(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "calling_peer", lambda context: SimpleNamespace(name="agent"))
    published = PublishedFolder(disk.folder / "artifacts")
    store = Store(disk.folder / "store.sqlite")
    total = published.put(iter([b"sum"]))
    spooled = disk.folder / "spool" / "0.update"
    service = ArtifactService(published, Rounds(spooled), Admission(Limits()))
    context: Any = Context()
    disk.fill()
    with pytest.raises(Aborted) as caught:
        [answer async for answer in service.UploadArtifact(requests(), context)]
    refused = refused_from_rpc(caught.value)
    assert refused is not None
    assert refused.reason is Reason.STORAGE_FULL
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not spooled.exists()
    wanted = artifact_pb2.DownloadArtifactRequest(sha256=total.sha256)
    await service.DownloadArtifact(wanted, context)
    assert (context.sent[0].header.size_bytes, context.sent[1].part) == (3, b"sum")
    disk.free()
    answers = [answer async for answer in service.UploadArtifact(requests(), context)]
    assert answers[-1].HasField("stored")
    assert spooled.read_bytes() == UPDATE
    store.close()


async def test_nothing_is_kept_of_an_upload_that_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "calling_peer", lambda context: SimpleNamespace(name="agent"))
    published, spooled = PublishedFolder(tmp_path / "artifacts"), tmp_path / "spool" / "0.update"
    service = ArtifactService(published, Rounds(spooled), Admission(Limits()))
    context: Any = Context()
    parts: Any = requests()  # holds the last part, as gRPC's does, until it ends or is closed
    assert [answer async for answer in service.UploadArtifact(parts, context)]
    assert parts.ag_frame is None


async def testkeep_conductinging_goes_on_after_a_fault_of_the_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coordinator.server.STORAGE_SECONDS", 0.0)
    faults = [StorageFault("store", "away"), StorageFull("store", "full")]

    class Conductor:
        async def conduct(self, until_idle: bool) -> None:
            """Fail as often as there are faults."""
            assert until_idle
            if faults:
                raise faults.pop()

    conductor: Any = Conductor()
    await keep_conducting(conductor, until_idle=True)
    assert faults == []
