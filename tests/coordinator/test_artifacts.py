"""An artifact arrives whole or not at all, however often its way is cut."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedloom.artifacts import (
    PART_BYTES,
    SENT_PART_BYTES,
    ArtifactReference,
    PartialFile,
    read_parts,
    write_artifact,
)
from fedloom.errors import Reason, Refused

WHOLE = bytes(range(256)) * 3


def reference(data: bytes) -> ArtifactReference:
    return ArtifactReference(hashlib.sha256(data).digest(), len(data))


def refusal(partial: PartialFile, part: bytes) -> Reason:
    with pytest.raises(Refused) as caught:
        partial.append(part)
    return caught.value.reason


@given(data=st.data(), whole=st.binary(max_size=2000))
def test_any_cuts_and_resumes_give_the_whole_file(data: st.DataObject, whole: bytes) -> None:
    with TemporaryDirectory() as folder:
        path, destination = Path(folder, "a.part"), Path(folder, "sub", "a")
        sent, complete = 0, False
        while not complete:
            with PartialFile(path, reference(whole)) as partial:
                assert partial.size_bytes == sent  # nothing that was stored is sent again
                for _ in range(data.draw(st.integers(1, 4))):
                    if size := data.draw(st.integers(min(1, len(whole) - sent), len(whole) - sent)):
                        partial.append(whole[sent : sent + size])
                        sent += size
                if complete := partial.complete:
                    partial.finish(destination)
        assert destination.read_bytes() == whole
        assert not path.exists()


@pytest.mark.parametrize("part", [b"", bytes(len(WHOLE) + 1), bytes(PART_BYTES + 1)])
def test_a_part_of_no_bytes_or_too_many_is_refused(tmp_path: Path, part: bytes) -> None:
    with PartialFile(tmp_path / "a.part", reference(WHOLE)) as partial:
        assert refusal(partial, part) is Reason.MALFORMED
        assert partial.size_bytes == 0
        partial.append(WHOLE[:100])
        assert refusal(partial, WHOLE[99:]) is Reason.MALFORMED
        partial.append(WHOLE[100:])  # the refusals changed nothing
        assert refusal(partial, b"x") is Reason.MALFORMED
        partial.finish(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE


def test_a_large_artifact_may_not_come_in_one_part(tmp_path: Path) -> None:
    large = bytes(PART_BYTES + 1)
    with PartialFile(tmp_path / "a.part", reference(large)) as partial:
        assert refusal(partial, large) is Reason.MALFORMED
        partial.append(large[:PART_BYTES])
        assert not partial.complete


def test_wrong_bytes_are_discarded(tmp_path: Path) -> None:
    path, destination = tmp_path / "a.part", tmp_path / "a"
    with PartialFile(path, reference(WHOLE)) as partial:
        partial.append(bytes(len(WHOLE)))
        with pytest.raises(Refused) as caught:
            partial.finish(destination)
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    assert not path.exists()
    assert not destination.exists()
    with PartialFile(path, reference(WHOLE)) as partial:
        assert partial.size_bytes == 0  # a second try starts anew


def test_bytes_that_changed_on_disk_between_two_tries_are_discarded(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    with PartialFile(path, reference(WHOLE)) as partial:
        partial.append(WHOLE[:500])
    path.write_bytes(b"x" * 500)
    with PartialFile(path, reference(WHOLE)) as partial:
        partial.append(WHOLE[500:])
        with pytest.raises(Refused) as caught:
            partial.finish(tmp_path / "a")
    assert caught.value.reason is Reason.DIGEST_MISMATCH


def test_a_file_that_is_longer_than_its_artifact_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    path.write_bytes(bytes(len(WHOLE) + 1))
    with PartialFile(path, reference(WHOLE)) as partial:
        assert partial.size_bytes == 0
        assert path.stat().st_size == 0
        partial.append(WHOLE)
        partial.finish(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == WHOLE


def test_finishing_early_is_refused_and_keeps_what_is_here(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    with PartialFile(path, reference(WHOLE)) as partial:
        partial.append(WHOLE[:-1])
        with pytest.raises(Refused) as caught:
            partial.finish(tmp_path / "a")
    assert caught.value.reason is Reason.MALFORMED
    assert not (tmp_path / "a").exists()
    with PartialFile(path, reference(WHOLE)) as partial:
        assert partial.size_bytes == len(WHOLE) - 1


def test_an_empty_artifact_is_complete_at_once(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "a.part", reference(b"")) as partial:
        assert partial.complete
        partial.finish(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b""


def test_what_is_discarded_is_gone(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "a.part", reference(WHOLE)) as partial:
        partial.append(WHOLE[:10])
        partial.discard()
        partial.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33)])
def test_a_name_of_another_length_is_refused(digest: bytes) -> None:
    with pytest.raises(Refused) as caught:
        ArtifactReference(digest, 0)
    assert caught.value.reason is Reason.MALFORMED


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    size=st.sampled_from([0, 1, SENT_PART_BYTES, SENT_PART_BYTES + 1, 3 * SENT_PART_BYTES - 1]),
    offset=st.integers(0, 4 * SENT_PART_BYTES),
)
def test_a_file_is_read_in_parts_from_any_offset(tmp_path: Path, size: int, offset: int) -> None:
    data = (WHOLE * (size // len(WHOLE) + 1))[:size]
    path = tmp_path / "a"
    path.write_bytes(data)
    parts = list(read_parts(path, offset))
    assert b"".join(parts) == data[offset:]
    assert all(0 < len(part) <= PART_BYTES for part in parts)


def test_a_written_artifact_is_named_by_its_bytes_and_replaces_an_older_one(
    tmp_path: Path,
) -> None:
    def parts() -> Iterator[bytes]:
        yield from (WHOLE[start : start + 100] for start in range(0, len(WHOLE), 100))

    path = tmp_path / "sub" / "a"
    assert write_artifact(path, iter([b"older and longer" * 1000])).size_bytes == 16_000
    assert write_artifact(path, parts()) == reference(WHOLE)
    assert path.read_bytes() == WHOLE
