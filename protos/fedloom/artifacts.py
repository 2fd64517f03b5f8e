"""How artifacts are cut into parts, and how a received one proves that it is whole.

An artifact is named by the SHA-256 of its bytes. It grows in a `PartialFile` next to its final
place and moves there only when its length and digest are right, so that a reader never meets half a
file. Nothing is synced to the platter: after a power cut a file that is not what its name says is
fetched again, because its name is its digest.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedloom.channels import WINDOW_BYTES
from fedloom.errors import Reason, Refused

PART_BYTES = 1 << 20  # largest part that is accepted; gRPC's 4 MiB limit stays above it
# Largest part that we send: as fast as 1 MiB, and a peer with many streams buffers much less.
SENT_PART_BYTES = 1 << 18
SMALLEST_PART_BYTES = 1 << 13
# While the link is not known: at 64 kbit/s 4 and 8 s each.
FIRST_PART_BYTES = 1 << 15
UNPROVEN_PART_BYTES = 1 << 16


@dataclass(frozen=True)
class ArtifactReference:
    """Name and length of an artifact."""

    sha256: bytes
    size_bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 32:
            raise Refused(
                Reason.MALFORMED, f"expected a SHA-256 of 32 bytes, found {len(self.sha256)}"
            )


def next_part_bytes(given: int, seconds: float) -> int:
    """Return the size of the next part when so many bytes were given to gRPC in so many seconds.

    About a second's worth: a cut costs what is in a part, and a link that is cut again and again
    still brings parts over. What fits into the window was given without having been sent.
    """
    carried = given - WINDOW_BYTES
    if carried <= 0:
        return min(max(given, FIRST_PART_BYTES), UNPROVEN_PART_BYTES)
    rate = carried / max(seconds, 1e-3)  # bytes per second
    return int(min(max(rate, SMALLEST_PART_BYTES), SENT_PART_BYTES))


def read_parts(
    path: Path, offset: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[bytes]:
    """Yield the file's bytes from `offset` in parts as large as the taker's speed suggests."""
    started, given = clock(), 0
    with path.open("rb") as file:
        file.seek(offset)
        while part := file.read(next_part_bytes(given, clock() - started)):
            given += len(part)
            yield part


def write_artifact(path: Path, parts: Iterator[bytes]) -> ArtifactReference:
    """Write `parts` to `path`, replacing it, and return what they are."""
    digest, size = hashlib.sha256(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # ext4 flushes a file to disk that is truncated and rewritten
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
    return ArtifactReference(digest.digest(), size)


def reference_of(path: Path) -> ArtifactReference | None:
    """Return what a file is; None when there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").digest()
        return ArtifactReference(sha256, file.tell())


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; files here are replaced, never written into."""
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {source.name} in the plan folder, found none"
        ) from error
    except OSError:  # another device, or a file system without hard links
        shutil.copy2(source, target)


class PartialFile:
    """An artifact being received: resumable, bounded by its stated size, checked at the end."""

    def __init__(self, path: Path, expected: ArtifactReference) -> None:
        self._path = path
        self._expected = expected
        self._digest = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)  # what was sent is here if we die
        self.size_bytes = os.fstat(descriptor).st_size
        if self.size_bytes > expected.size_bytes:  # not ours: a part is never written past it
            self._file.truncate(0)
            self.size_bytes = 0
        if self.size_bytes:
            while part := self._file.read(PART_BYTES):
                self._digest.update(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def complete(self) -> bool:
        """Whether all bytes are here; `finish` tells whether they are the right ones."""
        return self.size_bytes == self._expected.size_bytes

    def append(self, part: bytes) -> None:
        """Store the next bytes; raises Refused(MALFORMED) when they are none or too many."""
        room = self._expected.size_bytes - self.size_bytes
        if not 0 < len(part) <= min(PART_BYTES, room):
            raise Refused(
                Reason.MALFORMED,
                f"expected a part of 1..{min(PART_BYTES, room)} bytes at offset {self.size_bytes} "
                f"of {self._expected.size_bytes}, found {len(part)}",
            )
        if self._file.write(part) != len(part):
            raise OSError(errno.ENOSPC, "the part was not written whole", str(self._path))
        self._digest.update(part)
        self.size_bytes += len(part)

    def finish(self, destination: Path) -> None:
        """Move the whole artifact to `destination`; wrong bytes are deleted and refused."""
        self._file.close()
        if not self.complete:
            raise Refused(
                Reason.MALFORMED,
                f"expected {self._expected.size_bytes} bytes, found {self.size_bytes}",
            )
        if self._digest.digest() != self._expected.sha256:
            self.discard()
            raise Refused(
                Reason.DIGEST_MISMATCH,
                f"expected SHA-256 {self._expected.sha256.hex()}, found {self._digest.hexdigest()}",
            )
        destination.parent.mkdir(parents=True, exist_ok=True)
        self._path.replace(destination)

    def discard(self) -> None:
        """Delete what was received."""
        self._file.close()
        self._path.unlink(missing_ok=True)
