"""From a device's data files to examples that a plan's graphs take, by the plan's task.

Rows flow through in blocks: whatever the number of rows, only a block is in memory. What comes out
lies in files (`kept_examples`), and is read again only when its source, the plan or what is done to
rows has changed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from edge_agent.batches import Examples
from edge_agent.data import DataSource
from edge_agent.kept_examples import Block, Kept, discard_kept, read_kept, replacing
from edge_agent.recipes import (
    AnswerRecipe,
    ArrayRecipe,
    ClassifiedTextRecipe,
    Recipe,
    TaggedWordRecipe,
)
from edge_agent.records import data_files
from edge_agent.reports import DataReport
from edge_agent.row_readers import (
    ArrayReader,
    ClassifiedTextReader,
    TaggedWordReader,
    TemplateReader,
    Templates,
)
from edge_agent.rows import Labels, RowReader, Rows, nothing_usable
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan
from fedloom.tasks import (
    ArrayLearning,
    CausalLanguageModelling,
    TextClassification,
    TokenClassification,
)
from fedloom.version import software

T = TypeVar("T")
_log = structlog.get_logger()


def read_examples(folder: Path, plan: Plan, source: DataSource) -> tuple[Examples, int]:
    """Return a source's examples and the number of broken rows, which are left out.

    Raises Refused: DATA_* as `Rows`, PLAN_UNSUPPORTED for a tokenizer that cannot be loaded.
    """
    reading = reading_of(folder, plan, source)
    kept_in = source.treatment.kept_in
    try:
        key = _key(plan, source, reading.reader)
        if kept_in is not None and (kept := read_kept(kept_in)) and kept.key == key:
            examples = reading.recipe.examples(kept.arrays)
            if examples.sha256.hex() == kept.sha256:
                return examples, _broken_rows(kept)
            _log.warning("kept examples ignored", problem="damaged")
        with replacing(kept_in) as files:
            examples = reading.recipe.examples(files.write(reading.blocks()))
            report = reading.report.to_json()
            files.keep(key, examples.sha256, report)
    except Refused:
        if kept_in is not None:
            discard_kept(kept_in)  # of data that may not be there any more
        raise
    _tell(source, reading.report)
    return examples, reading.report.broken_rows


def read_held_out(
    folder: Path, plan: Plan, source: DataSource | None
) -> tuple[Examples | None, int]:
    """Return what `read_examples` does, without examples where a split has held no row out."""
    if source is None:
        return None, 0
    try:
        return read_examples(folder, plan, source)
    except Refused as refused:
        if source.treatment.part and refused.reason is Reason.DATA_EMPTY:
            return None, 0
        raise


def _broken_rows(kept: Kept) -> int:
    broken = kept.report["broken"]
    return sum(broken.values()) if isinstance(broken, dict) else 0


def _tell(source: DataSource, report: DataReport) -> None:
    told = report.to_json()
    facts = {name: told[name] for name in ("files", "rows", "elsewhere", "cut", "unknown_labels")}
    _log.info("data read", name=source.path.name, scrubbed=report.scrubbed.total(), **facts)
    if report.broken:
        _log.warning("broken rows left out", name=source.path.name, causes=told["broken"])


def _key(plan: Plan, source: DataSource, reader: RowReader[Any]) -> str:
    """Return a digest of all that examples follow from, without reading the data.

    The plan has its tokenizer's SHA-256 among its members.
    """
    files = []
    for path in data_files(source.path, reader.selection.endings):
        try:
            status = path.stat()
        except OSError:
            continue  # reading it says what is wrong
        files.append((str(path), status.st_size, status.st_mtime_ns))
    part = source.treatment.part
    salt = hashlib.sha256(part.salt).hexdigest() if part else ""
    said = asdict(replace(source, treatment=replace(source.treatment, part=None, kept_in=None)))
    about = [
        software(),
        hashlib.sha256(plan.encode()).hexdigest(),
        files,
        said,
        source.treatment.scrub.version,
        [salt, part.share, part.held_out] if part else None,
    ]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Reading(Generic[T]):
    """How one source becomes examples of one task, and what was found on the way."""

    source: DataSource
    reader: RowReader[T]
    recipe: Recipe[T]
    report: DataReport = field(default_factory=DataReport)

    def blocks(self) -> Iterator[Block]:
        """Read, check and encode the source once; raises Refused as `read_examples`."""
        rows = Rows(self.source, self.reader, self.report)
        yield from self.recipe.blocks(rows, self.report)
        if not self.report.rows:
            raise nothing_usable(self.source, self.report)


def reading_of(folder: Path, plan: Plan, source: DataSource) -> Reading[Any]:
    """Return how a source is read for a plan's task; nothing is read yet."""
    match plan.task:
        case TextClassification() as task:
            texts = ClassifiedTextReader(source, Labels(task.labels))
            return Reading(source, texts, ClassifiedTextRecipe(folder, task))
        case TokenClassification() as task:
            words = TaggedWordReader(source, Labels(task.labels))
            return Reading(source, words, TaggedWordRecipe(folder, task))
        case CausalLanguageModelling() as task:
            templates = templates_of(source, task)
            answers = TemplateReader(templates, Labels(()))
            return Reading(source, answers, AnswerRecipe(folder, task, templates))
        case ArrayLearning() as task:
            arrays = ArrayReader(source, task, Labels(task.labels))
            return Reading(source, arrays, ArrayRecipe(task))


def templates_of(source: DataSource, task: CausalLanguageModelling) -> Templates:
    """Return the device's own templates, or the plan's."""
    return Templates(
        task.prompt if source.prompt is None else source.prompt,
        task.answer if source.answer is None else source.answer,
    )
