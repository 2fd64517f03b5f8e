"""Published artifacts: whatever has a name has the bytes of that name."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.published import Published
from fedloom.errors import Reason, Refused
from fedloom.plans import BASE_FILE, PLAN_FILE, parse_plan
from tests.coordinator.samples import PlanFolder


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path / "home" / "artifacts")


def names(published: Published) -> set[str]:
    found = {path.name: path.read_bytes() for path in published.folder.iterdir()}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in found.items())
    return set(found)


def test_bytes_are_published_under_their_digest(published: Published) -> None:
    reference = published.put(iter([b"su", b"m"]))
    assert reference.sha256 == hashlib.sha256(b"sum").digest()
    assert reference.size_bytes == 3
    assert published.path(reference.sha256).read_bytes() == b"sum"
    assert published.put(iter([b"sum"])) == reference
    assert names(published) == {reference.sha256.hex()}


def test_what_breaks_off_leaves_nothing(published: Published) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        assert len(list(published.folder.iterdir())) == 1  # it grows under another name
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        published.put(parts())
    assert names(published) == set()


def test_a_plan_is_published_with_its_members(
    published: Published, plan_folder: PlanFolder
) -> None:
    plan, reference = published.put_plan(plan_folder.folder)
    assert plan == plan_folder.plan
    assert parse_plan(published.path(reference.sha256).read_bytes()) == plan
    digests = {member.sha256.hex() for member in plan.members}
    assert names(published) == digests | {reference.sha256.hex()}
    assert published.has_plan(plan)
    assert published.put_plan(plan_folder.folder) == (plan, reference)
    published.path(plan.members[0].sha256).unlink()
    assert not published.has_plan(plan)


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


def test_what_a_crash_left_does_not_stop_a_plan(
    published: Published, plan_folder: PlanFolder
) -> None:
    member = plan_folder.plan.members[0]
    published.path(member.sha256).with_suffix(".part").write_bytes(b"half")
    published.put_plan(plan_folder.folder)
    names(published)
