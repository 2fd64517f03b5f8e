"""Published artifacts as objects on a server that speaks S3.

An object's name is known only when all its bytes are, and S3 cannot rename: what comes as a stream
lies on the local disk, without a name, until it is sent. Downloads are read in blocks of a request
each, so that a slow agent keeps no connection open; a block is fetched while the one before it is
sent.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from coordinator.faults import StorageFault, StorageFull, faults_of
from coordinator.published import NAME, Published, PublishedArtifact, not_published
from fedloom.artifacts import PART_BYTES, ArtifactReference, next_part_bytes
from fedloom.errors import ConfigError

BLOCK_BYTES = PART_BYTES  # of one download request
READERS = 16  # download requests at once
FRESH_SECONDS = 12 * 3600.0  # an object published before that is sent again, for its time
# One piece after another: memory is one piece, and the sender waits for a network, not for us.
_TRANSFER = TransferConfig(
    multipart_threshold=16 << 20,
    multipart_chunksize=16 << 20,
    use_threads=False,
    preferred_transfer_client="classic",
)
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_.-]+)*)/?")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+/?")
_MISSING = {"404", "NoSuchKey"}
_FULL = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}


def open_bucket(
    url: str, endpoint: str, scratch: Path, clock: Callable[[], float] = time.time
) -> "PublishedBucket":
    """Open `s3://BUCKET/PREFIX`; an `endpoint` is the URL of a server other than Amazon's.

    Who we are is said by the usual environment variables and files of AWS. `scratch` is a local
    folder with room for the largest sum. Raises ConfigError, which never quotes what it was given.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise ConfigError("artifacts", 'expected "folder" or "s3://BUCKET/PREFIX"')
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise ConfigError("artifacts_endpoint", 'expected "https://HOST:PORT"')
    settings = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=READERS,
        # The bucket in front of the host's name is Amazon's own habit.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        client = Session().client("s3", endpoint_url=endpoint or None, config=settings)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError("artifacts", f"AWS's settings do not do: {_line(error)}") from error
    return PublishedBucket(client, found[1], found[2].strip("/"), scratch, clock)


class PublishedBucket(Published):
    """Objects named by their SHA-256 in hex, below a prefix."""

    def __init__(
        self,
        client: Any,
        bucket: str,
        prefix: str,
        scratch: Path,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._bucket = {"Bucket": bucket}
        self._prefix = f"{prefix}/" if prefix else ""
        self._scratch = scratch
        self._clock = clock
        self._where = f"s3://{bucket}/{self._prefix}"
        self._readers = ThreadPoolExecutor(READERS, "bucket")

    def put(self, parts: Iterator[bytes]) -> ArtifactReference:
        """Publish bytes once they have all come; meanwhile they lie in the scratch folder."""
        digest, size = hashlib.sha256(), 0
        with faults_of(str(self._scratch)):
            self._scratch.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self._scratch) as file:
                for part in parts:
                    file.write(part)
                    digest.update(part)
                    size += len(part)
                file.seek(0)
                artifact = ArtifactReference(digest.digest(), size)
                self._send(file, artifact)
        return artifact

    def put_verified(self, path: Path, artifact: ArtifactReference) -> None:
        """Send a file, unless the same was sent lately."""
        with faults_of(str(path)), path.open("rb") as file:
            self._send(file, artifact)

    def _send(self, file: BinaryIO, artifact: ArtifactReference) -> None:
        found = self._head(artifact.sha256)
        oldest = self._clock() - FRESH_SECONDS
        if found and found.size_bytes == artifact.size_bytes and found.published_at > oldest:
            return
        with self._asking():
            key = self._key(artifact.sha256)
            self._client.upload_fileobj(file, **self._bucket, Key=key, Config=_TRANSFER)

    def size(self, sha256: bytes) -> int | None:
        """Return the object's length."""
        found = self._head(sha256)
        return None if found is None else found.size_bytes

    def _head(self, sha256: bytes) -> PublishedArtifact | None:
        with self._asking():
            try:
                found = self._client.head_object(**self._bucket, Key=self._key(sha256))
            except ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise
        return _published(sha256, found["ContentLength"], found["LastModified"])

    def parts(self, sha256: bytes, offset: int = 0) -> Iterator[bytes]:
        """Yield the object's bytes from `offset`, a block at once."""
        while block := self._block(sha256, offset):
            yield block
            offset += len(block)

    def _block(self, sha256: bytes, offset: int) -> bytes:
        span = f"bytes={offset}-{offset + BLOCK_BYTES - 1}"
        with self._asking():
            try:
                key = self._key(sha256)
                answer = self._client.get_object(**self._bucket, Key=key, Range=span)
                return bytes(answer["Body"].read())
            except ClientError as error:
                if _code(error) == "InvalidRange":  # there is nothing behind the end
                    return b""
                if _code(error) in _MISSING:
                    raise not_published(sha256) from None
                raise

    async def stream(self, sha256: bytes, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the object's bytes from `offset`; the loop never waits for the server."""
        loop = asyncio.get_running_loop()
        coming = loop.run_in_executor(self._readers, self._block, sha256, offset)
        began, given = time.monotonic(), 0
        try:
            while block := await coming:
                offset += len(block)
                coming = loop.run_in_executor(self._readers, self._block, sha256, offset)
                start = 0
                while start < len(block):
                    size = next_part_bytes(given, time.monotonic() - began)
                    part = block[start : start + size]
                    start, given = start + len(part), given + len(part)
                    yield part
        finally:
            coming.cancel()

    def artifacts(self) -> Iterator[PublishedArtifact]:
        """Yield the objects below the prefix that are named as artifacts are."""
        for found in self._listed("list_objects_v2", "Contents"):
            if sha256 := self._sha256(found["Key"]):
                yield _published(sha256, found["Size"], found["LastModified"])

    def delete(self, sha256: bytes, before: float) -> bool:
        """Delete the object; its time is looked at again, a request before."""
        found = self._head(sha256)
        if found is None or found.published_at >= before:
            return False
        with self._asking():
            self._client.delete_object(**self._bucket, Key=self._key(sha256))
        return True

    def delete_partials(self, before: float) -> int:
        """Abort uploads that a killed process left."""
        deleted = 0
        for found in self._listed("list_multipart_uploads", "Uploads"):
            if self._sha256(found["Key"]) and found["Initiated"].timestamp() < before:
                upload = {"Key": found["Key"], "UploadId": found["UploadId"]}
                with self._asking():
                    self._client.abort_multipart_upload(**self._bucket, **upload)
                deleted += 1
        return deleted

    def _listed(self, request: str, kind: str) -> Iterator[dict[str, Any]]:
        with self._asking():
            pages = self._client.get_paginator(request)
            for page in pages.paginate(**self._bucket, Prefix=self._prefix):
                yield from page.get(kind, ())

    def _key(self, sha256: bytes) -> str:
        return f"{self._prefix}{sha256.hex()}"

    def _sha256(self, key: str) -> bytes | None:
        name = key.removeprefix(self._prefix)
        return bytes.fromhex(name) if NAME.fullmatch(name) else None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn what the server or the way to it says into a StorageFault."""
        try:
            yield
        except ClientError as error:
            code = _code(error)
            fault = StorageFull if code in _FULL else StorageFault
            raise fault(self._where, f"the server answers {code}") from error
        except BotoCoreError as error:
            raise StorageFault(self._where, _line(error)) from error


def _published(sha256: bytes, size: int, moment: Any) -> PublishedArtifact:
    return PublishedArtifact(sha256, size, moment.timestamp())


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error without a code"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
