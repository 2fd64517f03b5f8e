"""What agents may download: plans, their members and sums, each named by its SHA-256.

    Published            what the coordinator asks of the place where they are
    ├── PublishedFolder  files on this machine
    └── PublishedBucket  objects on a server that speaks S3 (`coordinator.bucket`)

An artifact shows under its name only when it is whole. A place that fails raises StorageFault.
"""

import asyncio
import fcntl
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from coordinator.faults import faults_of
from fedloom.artifacts import (
    ArtifactReference,
    link_or_copy,
    read_parts,
    reference_of,
    write_artifact,
)
from fedloom.errors import Reason, Refused
from fedloom.plans import MAX_PLAN_BYTES, PLAN_FILE, Plan, load_plan, parse_plan, verify_members

NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PublishedArtifact:
    """An artifact and when it was last published, in seconds since 1970."""

    sha256: bytes
    size_bytes: int
    published_at: float


class Published(ABC):
    """A place of published artifacts. Its methods block, but for those that are `async`."""

    @abstractmethod
    def put(self, parts: Iterator[bytes]) -> ArtifactReference:
        """Publish bytes as they come."""

    @abstractmethod
    def put_verified(self, path: Path, artifact: ArtifactReference) -> None:
        """Publish a file that the caller has compared with its digest."""

    @abstractmethod
    def size(self, sha256: bytes) -> int | None:
        """Return the artifact's length in bytes; None when it is not here."""

    @abstractmethod
    def parts(self, sha256: bytes, offset: int = 0) -> Iterator[bytes]:
        """Yield its bytes from `offset`, at most 1 MiB at once; raises Refused(NOT_FOUND)."""

    @abstractmethod
    def artifacts(self) -> Iterator[PublishedArtifact]:
        """Yield all that is here."""

    @abstractmethod
    def delete(self, sha256: bytes, before: float) -> bool:
        """Delete the artifact unless it was published, or published again, after `before`."""

    @abstractmethod
    def delete_partials(self, before: float) -> int:
        """Delete what was begun before that time and never came to its end; return how many."""

    def put_plan(self, folder: Path) -> tuple[Plan, ArtifactReference]:
        """Publish a plan and its members, after comparing each with its hash."""
        plan = load_plan(folder)
        verify_members(plan, folder)
        for member in plan.members:
            artifact = ArtifactReference(member.sha256, member.size_bytes)
            self.put_verified(folder / member.name, artifact)
        return plan, self.put(iter([(folder / PLAN_FILE).read_bytes()]))

    def has_plan(self, plan: Plan) -> bool:
        """Whether every member is still here."""
        return all(self.size(member.sha256) == member.size_bytes for member in plan.members)

    def read_plan(self, reference: ArtifactReference) -> Plan:
        """Read a plan; raises Refused(PLAN_MISMATCH) when it is gone or is not what it was."""
        data = b""
        try:
            for part in self.parts(reference.sha256):
                data += part
                if len(data) > MAX_PLAN_BYTES:
                    break  # whatever this is, it is not worth the memory
        except Refused as refused:
            raise Refused(Reason.PLAN_MISMATCH, f"expected the plan: {refused.subject}") from None
        if hashlib.sha256(data).digest() != reference.sha256:
            raise Refused(Reason.PLAN_MISMATCH, "expected the plan that was queued, found another")
        return parse_plan(data)

    def fetch(self, sha256: bytes, path: Path) -> None:
        """Make the artifact a file; raises Refused(NOT_FOUND or DIGEST_MISMATCH) and makes none."""
        found = None
        try:
            with faults_of(str(path)):
                self._copy(sha256, path)
                found = reference_of(path)
        finally:
            if found is None or found.sha256 != sha256:
                path.unlink(missing_ok=True)
        if found is None or found.sha256 != sha256:
            raise Refused(Reason.DIGEST_MISMATCH, f"expected the artifact {sha256.hex()}")

    def _copy(self, sha256: bytes, path: Path) -> None:
        write_artifact(path, self.parts(sha256))

    async def find(self, sha256: bytes) -> int | None:
        """Return the artifact's length in bytes; None when it is not here."""
        return await asyncio.to_thread(self.size, sha256)

    @abstractmethod
    def stream(self, sha256: bytes, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the artifact's bytes from `offset` in parts as we send them."""


def not_published(sha256: bytes) -> Refused:
    """Return the refusal of an artifact that is not here."""
    return Refused(Reason.NOT_FOUND, f"expected a published artifact: {sha256[:32].hex()}")


class PublishedFolder(Published):
    """Files named by their SHA-256 in hex."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: bytes) -> Path:
        """Return where the artifact lies."""
        return self.folder / sha256.hex()

    def put(self, parts: Iterator[bytes]) -> ArtifactReference:
        """Publish bytes as they come; they show under their name only when they are whole."""
        with self._partial() as partial:
            reference = write_artifact(partial, parts)
            self._show(partial, reference.sha256)
        return reference

    def put_verified(self, path: Path, artifact: ArtifactReference) -> None:
        """Publish a file as a hard link where the file system allows, else as a copy.

        Also when it is here: what a power cut spoilt is mended, and what was published long ago is
        published now.
        """
        with self._partial() as partial:
            link_or_copy(path, partial)
            self._show(partial, artifact.sha256)

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        partial = self.folder / f"{os.urandom(8).hex()}.part"
        with faults_of(str(self.folder)):
            try:
                yield partial
            finally:
                partial.unlink(missing_ok=True)

    def _show(self, partial: Path, sha256: bytes) -> None:
        with self._locked(fcntl.LOCK_SH):
            partial.replace(self.path(sha256))

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Keep whoever publishes apart from whoever deletes, in any process."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def size(self, sha256: bytes) -> int | None:
        """Return the file's length."""
        try:
            with faults_of(str(self.folder)):
                return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def parts(self, sha256: bytes, offset: int = 0) -> Iterator[bytes]:
        """Yield the file's bytes from `offset`."""
        try:
            with faults_of(str(self.folder)):
                yield from read_parts(self.path(sha256), offset)
        except FileNotFoundError:
            raise not_published(sha256) from None

    def _copy(self, sha256: bytes, path: Path) -> None:
        if self.size(sha256) is None:
            raise not_published(sha256)
        link_or_copy(self.path(sha256), path)

    async def find(self, sha256: bytes) -> int | None:
        """Return the file's length; no thread is worth it."""
        return self.size(sha256)

    async def stream(self, sha256: bytes, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the file's bytes from `offset`.

        They are read on the loop: sums are in the page cache, and a hop to a thread and back for
        each part costs more than reading it.
        """
        for part in self.parts(sha256, offset):
            yield part

    def artifacts(self) -> Iterator[PublishedArtifact]:
        """Yield the files that are named as artifacts are; others are not ours.

        Their time is that of the last change of the file or its names: a hard link to a file of an
        old plan is published now, and the time of writing is the plan folder's business.
        """
        with faults_of(str(self.folder)), os.scandir(self.folder) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        sha256 = bytes.fromhex(entry.name)
                        yield PublishedArtifact(sha256, found.st_size, found.st_ctime)

    def delete(self, sha256: bytes, before: float) -> bool:
        """Delete the file; its time is looked at again, with nobody publishing meanwhile."""
        path = self.path(sha256)
        with suppress(FileNotFoundError), faults_of(str(path)), self._locked(fcntl.LOCK_EX):
            if path.stat().st_ctime < before:
                path.unlink()
                return True
        return False

    def delete_partials(self, before: float) -> int:
        """Delete files that a killed process left."""
        deleted = 0
        with faults_of(str(self.folder)):
            for path in self.folder.glob("*.part"):
                with suppress(FileNotFoundError):
                    if path.stat().st_ctime < before:
                        path.unlink()
                        deleted += 1
        return deleted
