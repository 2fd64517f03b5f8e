"""Published artifacts, in a folder or a bucket: what has a name has the bytes of that name."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.bucket import BLOCK_BYTES, PublishedBucket
from coordinator.published import Published, PublishedFolder
from fedloom.artifacts import PART_BYTES, SENT_PART_BYTES, ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.plans import BASE_FILE, PLAN_FILE
from tests.coordinator.samples import PlanFolder

ABSENT = hashlib.sha256(b"absent").digest()
LARGE = bytes(range(256)) * (9 * BLOCK_BYTES // 1024 + 1)  # two blocks and a quarter


def read(published: Published, sha256: bytes, offset: int = 0) -> bytes:
    parts = list(published.parts(sha256, offset))
    assert all(0 < len(part) <= PART_BYTES for part in parts)
    return b"".join(parts)


async def streamed(published: Published, sha256: bytes, offset: int) -> bytes:
    async with aclosing(published.stream(sha256, offset)) as stream:
        parts = [part async for part in stream]
    assert all(0 < len(part) <= SENT_PART_BYTES for part in parts)
    return b"".join(parts)


def names(published: Published) -> set[bytes]:
    """Return what is here, after comparing everything with its name."""
    found = {artifact.sha256: artifact for artifact in published.artifacts()}
    for sha256, artifact in found.items():
        data = read(published, sha256)
        assert hashlib.sha256(data).digest() == sha256
        assert len(data) == artifact.size_bytes == published.size(sha256)
    return set(found)


def soon() -> float:
    """Return a moment before which all that a test did was done; an object's time is in seconds."""
    return time.time() + 10


def test_bytes_are_published_under_their_digest(published: Published) -> None:
    reference = published.put(iter([b"su", b"m"]))
    assert reference == ArtifactReference(hashlib.sha256(b"sum").digest(), 3)
    assert read(published, reference.sha256) == b"sum"
    assert published.put(iter([b"sum"])) == reference
    assert names(published) == {reference.sha256}


def test_an_artifact_of_no_bytes_is_one(published: Published) -> None:
    reference = published.put(iter([]))
    assert (published.size(reference.sha256), read(published, reference.sha256)) == (0, b"")
    assert names(published) == {reference.sha256}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    size=st.sampled_from([1, SENT_PART_BYTES, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1]),
    offset=st.integers(0, 3 * BLOCK_BYTES),
)
async def test_any_offset_gives_the_rest(published: Published, size: int, offset: int) -> None:
    data = LARGE[:size]
    sha256 = published.put(iter([data])).sha256
    assert await published.find(sha256) == size
    for start in (offset, min(offset, size), size - 1, size):
        assert read(published, sha256, start) == data[start:]
        assert await streamed(published, sha256, start) == data[start:]


async def test_what_is_not_here_is_not_found(published: Published, tmp_path: Path) -> None:
    published.put(iter([b"sum"]))
    assert published.size(ABSENT) is None
    assert await published.find(ABSENT) is None
    assert not published.delete(ABSENT, soon())
    with pytest.raises(Refused) as caught:
        read(published, ABSENT)
    assert caught.value.reason is Reason.NOT_FOUND
    with pytest.raises(Refused) as caught:
        await streamed(published, ABSENT, 0)
    assert caught.value.reason is Reason.NOT_FOUND
    with pytest.raises(Refused) as caught:
        published.fetch(ABSENT, tmp_path / "absent")
    assert caught.value.reason is Reason.NOT_FOUND
    assert not (tmp_path / "absent").exists()


def test_what_breaks_off_leaves_nothing(published: Published, tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield LARGE
        assert names(published) == set()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        published.put(parts())
    assert names(published) == set()
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_an_artifact_becomes_a_file(published: Published, tmp_path: Path) -> None:
    reference = published.put(iter([LARGE]))
    published.fetch(reference.sha256, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == LARGE


def test_a_plan_is_published_with_its_members(
    published: Published, plan_folder: PlanFolder
) -> None:
    plan, reference = published.put_plan(plan_folder.folder)
    assert plan == plan_folder.plan
    assert published.read_plan(reference) == plan
    digests = {member.sha256 for member in plan.members}
    assert names(published) == digests | {reference.sha256}
    assert published.has_plan(plan)
    assert published.put_plan(plan_folder.folder) == (plan, reference)
    assert published.delete(plan.members[0].sha256, soon())
    assert not published.has_plan(plan)
    published.put_plan(plan_folder.folder)
    assert published.has_plan(plan)
    assert names(published) == digests | {reference.sha256}


def test_a_changed_member_is_refused_before_anything_is_published(
    published: Published, plan_folder: PlanFolder
) -> None:
    base = plan_folder.folder / BASE_FILE
    base.write_bytes(base.read_bytes()[:-1] + b"?")
    with pytest.raises(Refused) as caught:
        published.put_plan(plan_folder.folder)
    assert caught.value.reason is Reason.PLAN_MISMATCH
    assert names(published) == set()


def test_a_folder_without_a_plan_is_refused(published: Published, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        published.put_plan(tmp_path)
    assert caught.value.reason is Reason.PLAN_MISMATCH
    (tmp_path / PLAN_FILE).write_bytes(b"\xff")
    with pytest.raises(Refused) as caught:
        published.put_plan(tmp_path)
    assert caught.value.reason is Reason.MALFORMED


def spoil(published: Published, sha256: bytes) -> None:
    """Put other bytes where the artifact is, as a power cut may."""
    if isinstance(published, PublishedFolder):
        published.path(sha256).unlink()  # else its other names would be spoilt with it
        published.path(sha256).write_bytes(b"spoilt")
    else:
        assert isinstance(published, PublishedBucket)
        bucket, key = published._bucket, published._key(sha256)
        published._client.put_object(**bucket, Key=key, Body=b"spoilt")


def test_a_plan_that_is_gone_or_spoilt_is_no_plan(
    published: Published, plan_folder: PlanFolder, tmp_path: Path
) -> None:
    plan, reference = published.put_plan(plan_folder.folder)
    spoil(published, reference.sha256)
    for wrong in (ArtifactReference(ABSENT, 7), reference):
        with pytest.raises(Refused) as caught:
            published.read_plan(wrong)
        assert caught.value.reason is Reason.PLAN_MISMATCH
    with pytest.raises(Refused) as caught:
        published.fetch(reference.sha256, tmp_path / "file")
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    assert not (tmp_path / "file").exists()
    spoil(published, plan.members[0].sha256)
    published.put_plan(plan_folder.folder)  # mends both
    assert published.read_plan(reference) == plan
    names(published)


def test_only_what_is_old_is_deleted(published: Published) -> None:
    sha256 = published.put(iter([b"sum"])).sha256
    (artifact,) = published.artifacts()
    assert abs(artifact.published_at - time.time()) < 60
    assert not published.delete(sha256, artifact.published_at)
    assert names(published) == {sha256}
    assert published.delete(sha256, artifact.published_at + 1)
    assert names(published) == set()
    assert not published.delete(sha256, soon())
