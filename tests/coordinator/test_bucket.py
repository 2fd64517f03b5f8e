"""A bucket, beyond what it shares with folders: large artifacts, bad servers and slow ones."""

import asyncio
import hashlib
import threading
import time
import tracemalloc
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError
from botocore.stub import Stubber

from coordinator.bucket import BLOCK_BYTES, FRESH_SECONDS, PublishedBucket, open_bucket
from coordinator.faults import StorageFault, StorageFull, is_full
from coordinator.premises import open_published
from fedloom.artifacts import ArtifactReference
from fedloom.errors import ConfigError
from tests.coordinator.object_server import ObjectServer

MEBIBYTE = 1 << 20
LARGE_BYTES = 48 * MEBIBYTE
SECRET = "AKIA-secret"  # noqa: S105 - must be seen nowhere


class Clock:
    """A clock that a test may put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bucket(objects: ObjectServer, tmp_path: Path, clock: Clock) -> PublishedBucket:
    return open_bucket(f"s3://{objects.bucket()}/x", objects.endpoint, tmp_path / "spool", clock)


@pytest.fixture
def requests(bucket: PublishedBucket) -> Counter[str]:
    """What the bucket's server was asked, by operation."""
    counted: Counter[str] = Counter()

    def count(event_name: str, **_: Any) -> None:
        counted[event_name.rpartition(".")[2]] += 1

    bucket._client.meta.events.register("before-call.s3", count)
    return counted


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, ArtifactReference]:
    """A file of several pieces; it takes no room on the disk."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").digest()
    return path, ArtifactReference(sha256, LARGE_BYTES)


@pytest.mark.parametrize(
    "url", ["s3://", "s3://B", f"s3://key:{SECRET}@bucket/x", f"https://{SECRET}/x", "elsewhere"]
)
def test_what_is_no_url_of_a_bucket_is_refused_unquoted(url: str, tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text(f'artifacts = "{url}"\n')
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX") as caught:
        open_published(tmp_path)
    assert SECRET not in str(caught.value)


def test_an_endpoint_with_a_secret_is_refused_unquoted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="artifacts_endpoint") as caught:
        open_bucket("s3://bucket", f"https://key:{SECRET}@host", tmp_path)
    assert SECRET not in str(caught.value)


async def test_a_large_artifact_goes_in_pieces_and_comes_in_blocks_through_little_memory(
    bucket: PublishedBucket, requests: Counter[str], large: tuple[Path, ArtifactReference]
) -> None:
    path, artifact = large
    tracemalloc.start()
    bucket.put_verified(path, artifact)
    _, sending = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    digest = hashlib.sha256()
    async with aclosing(bucket.stream(artifact.sha256, 0)) as stream:
        async for part in stream:
            digest.update(part)
    _, receiving = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert digest.digest() == artifact.sha256
    assert requests["UploadPart"] == 3
    assert requests["CompleteMultipartUpload"] == 1
    assert sending < 40 * MEBIBYTE
    assert receiving < 8 * MEBIBYTE


def test_a_large_upload_that_breaks_off_shows_nothing_and_leaves_nothing(
    bucket: PublishedBucket, large: tuple[Path, ArtifactReference]
) -> None:
    sent = []

    def cut(**_: Any) -> None:
        sent.append(1)
        if len(sent) > 2:
            raise ConnectionClosedError(endpoint_url="the server")

    bucket._client.meta.events.register("before-call.s3.UploadPart", cut)
    path, artifact = large
    with pytest.raises(StorageFault, match="the server"):
        bucket.put_verified(path, artifact)
    assert list(bucket.artifacts()) == []
    assert list(bucket._listed("list_multipart_uploads", "Uploads")) == []


def test_what_was_sent_lately_is_not_sent_again(
    bucket: PublishedBucket, requests: Counter[str], clock: Clock
) -> None:
    for ahead in (0.0, FRESH_SECONDS - 60):
        clock.ahead = ahead
        bucket.put(iter([b"sum"]))
    assert requests["PutObject"] == 1
    clock.ahead = FRESH_SECONDS + 60
    bucket.put(iter([b"sum"]))  # it would look old to whoever collects garbage
    assert requests["PutObject"] == 2


def test_only_uploads_of_ours_are_given_up(bucket: PublishedBucket) -> None:
    ours, theirs = bucket._key(bytes(32)), bucket._prefix + "theirs"
    for key in (ours, theirs):
        bucket._client.create_multipart_upload(**bucket._bucket, Key=key)
    assert bucket.delete_partials(before=0.0) == 0
    assert bucket.delete_partials(before=time.time()) == 1
    assert [u["Key"] for u in bucket._listed("list_multipart_uploads", "Uploads")] == [theirs]


def test_objects_of_others_are_none_of_ours(bucket: PublishedBucket) -> None:
    for key in ("x/readme", f"y/{'0' * 64}", f"x/y/{'0' * 64}", f"x/{'0' * 64}.part"):
        bucket._client.put_object(**bucket._bucket, Key=key, Body=b"")
    assert list(bucket.artifacts()) == []


def test_many_objects_are_listed_in_pages(
    bucket: PublishedBucket, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = {bucket.put(iter([bytes([number])])).sha256 for number in range(7)}

    def small_pages(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 3

    bucket._client.meta.events.register("provide-client-params.s3.ListObjectsV2", small_pages)
    assert {artifact.sha256 for artifact in bucket.artifacts()} == put
    assert requests["ListObjectsV2"] == 3


async def test_the_loop_goes_on_while_the_server_thinks_and_one_block_is_fetched_ahead(
    bucket: PublishedBucket, requests: Counter[str]
) -> None:
    data = bytes(4 * BLOCK_BYTES)
    sha256 = bucket.put(iter([data])).sha256
    may_answer, asked = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def think(**_: Any) -> None:
        loop.call_soon_threadsafe(asked.set)
        assert may_answer.wait(60)

    bucket._client.meta.events.register("before-call.s3.GetObject", think)
    stream = bucket.stream(sha256, 0)
    first = asyncio.create_task(anext(stream))
    await asyncio.wait_for(asked.wait(), 60)  # for ever, if the request were made on the loop
    assert not first.done()
    may_answer.set()
    assert (await first)[:1] == b"\0"
    await stream.aclose()
    assert 1 <= requests["GetObject"] <= 2


def test_a_server_that_is_away_is_a_fault(tmp_path: Path, objects: ObjectServer) -> None:
    bucket = open_bucket("s3://bucket/x", "http://127.0.0.1:1", tmp_path)
    with pytest.raises(StorageFault, match="Could not connect") as caught:
        bucket.put(iter([b"sum"]))
    assert caught.value.where == "s3://bucket/x/"
    assert not is_full(caught.value)


def test_a_bucket_that_is_not_there_is_a_fault(tmp_path: Path, objects: ObjectServer) -> None:
    bucket = open_bucket("s3://no-such-bucket", objects.endpoint, tmp_path)
    with pytest.raises(StorageFault, match="NoSuchBucket"):
        bucket.put(iter([b"sum"]))
    with pytest.raises(StorageFault, match="NoSuchBucket"):
        list(bucket.artifacts())


def test_a_bucket_without_credentials_is_a_fault(
    bucket: PublishedBucket, objects: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    stranger = open_bucket("s3://bucket", objects.endpoint, tmp_path)
    with pytest.raises(StorageFault, match="credentials"):
        stranger.put(iter([b"sum"]))


def test_a_server_that_is_full_says_so(bucket: PublishedBucket) -> None:
    with Stubber(bucket._client) as server:
        server.add_client_error("head_object", "404", http_status_code=404)
        server.add_client_error("put_object", "XMinioStorageFull", http_status_code=507)
        with pytest.raises(StorageFull) as caught:
            bucket.put(iter([b"sum"]))
    assert is_full(caught.value)
