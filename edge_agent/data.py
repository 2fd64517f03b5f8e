"""Where this device's data lie, which columns are read, and what is done to rows on the way."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from edge_agent.scrubbing import NO_SCRUB, Scrub


class UnknownLabels(StrEnum):
    """What becomes of rows whose label is none of the plan's."""

    REFUSE = "refuse"  # the whole file: labels were mistyped, or belong to another plan
    SKIP = "skip"


@dataclass(frozen=True)
class Part:
    """One side of a split by content: `share` of all rows is held out, 0..1.

    A row's side follows from what the model is given of it and from `salt`, which never leaves the
    device: it stays the same when rows are appended or reordered, equal rows share a side, and
    nobody else can tell which rows quality is measured on.
    """

    salt: bytes = field(repr=False)
    share: float
    held_out: bool

    def contains(self, content: Iterable[bytes]) -> bool:
        """Whether a row of this content is on this side."""
        digest = hmac.new(self.salt, digestmod=hashlib.sha256)
        for piece in content:
            digest.update(len(piece).to_bytes(8, "little") + piece)
        drawn = int.from_bytes(digest.digest()[:8], "little")
        return (drawn < self.share * 2**64) == self.held_out


@dataclass(frozen=True)
class Treatment:
    """What is done to the rows of a source, and where the outcome is kept.

    `kept_in` is a folder for this source alone, which a later process reads instead of the source;
    None: the outcome lasts as long as the process.
    """

    unknown_labels: UnknownLabels = UnknownLabels.REFUSE
    scrub: Scrub = NO_SCRUB
    part: Part | None = None
    kept_in: Path | None = None


AS_IT_IS = Treatment()


@dataclass(frozen=True)
class DataSource:
    """A data file, or a folder of them, and the columns to read; names' endings tell formats.

    Which columns matter depends on the task: `text` and `label`; `words` and `tags`; those named in
    the templates (`prompt` and `answer` take the place of the plan's); or `arrays`, which gives the
    plan's inputs their columns by name, an input without an entry being a column of its own name.
    There `labels` stands for the values to be learned, which are else in `label`.
    """

    path: Path
    text: str = "text"
    label: str = "label"
    words: str = "words"
    tags: str = "tags"
    prompt: str | None = None
    answer: str | None = None
    arrays: tuple[tuple[str, tuple[str, ...]], ...] = ()
    treatment: Treatment = AS_IT_IS
