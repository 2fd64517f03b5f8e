"""What each task makes of a record: the columns that it needs, and the row that they give."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_agent.columns import Column
from edge_agent.data import DataSource
from edge_agent.records import (
    ARCHIVES,
    MAX_FIELD_CHARACTERS,
    MAX_WORDS,
    TABLES,
    WORD_LISTS,
    Selection,
    Values,
)
from edge_agent.reports import Cause
from edge_agent.rows import BrokenRow, Labels, Rows
from edge_agent.scrubbing import Scrubber
from fedloom.tasks import ArrayLearning, fill_template, template_fields

LABELS = "labels"  # in place of an input's name: the values to be learned
_SURROGATE = re.compile("[\ud800-\udfff]")
Floats = NDArray[np.float32]


class ClassifiedText(NamedTuple):
    """A text and its class, the index of a label."""

    text: str
    label: int


@dataclass(frozen=True)
class ClassifiedTextReader:
    """See RowReader: rows of text classification."""

    source: DataSource
    labels: Labels

    @property
    def selection(self) -> Selection:
        """See RowReader."""
        return Selection((self.source.text, self.source.label))

    def row(self, values: Values) -> ClassifiedText:
        """See RowReader."""
        text, label = (_text(value).strip() for value in values)
        if not text or not label:
            raise BrokenRow(Cause.INCOMPLETE)
        return ClassifiedText(text, self.labels.number(label))

    def content(self, row: ClassifiedText) -> Iterable[bytes]:
        """See RowReader."""
        return (row.text.encode(),)

    def scrubbed(self, row: ClassifiedText, scrubber: Scrubber) -> ClassifiedText:
        """See RowReader."""
        return row._replace(text=scrubber.text(row.text))

    def labels_of(self, row: ClassifiedText) -> Iterable[str]:
        """See RowReader."""
        return (self.labels.names[row.label],)


class TaggedWords(NamedTuple):
    """The words of a text, and for each the index of a label."""

    words: list[str]
    tags: list[int]


@dataclass(frozen=True)
class TaggedWordReader:
    """See RowReader: rows of token classification."""

    source: DataSource
    labels: Labels

    @property
    def selection(self) -> Selection:
        """See RowReader."""
        return Selection((self.source.words, self.source.tags), (*TABLES, *WORD_LISTS))

    def row(self, values: Values) -> TaggedWords:
        """See RowReader."""
        words, tags = (_texts(value) for value in values)
        if len(words) != len(tags):
            raise BrokenRow(Cause.MISALIGNED)
        if not all(tags):
            raise BrokenRow(Cause.INCOMPLETE)
        return TaggedWords(words, [self.labels.number(tag) for tag in tags])

    def content(self, row: TaggedWords) -> Iterable[bytes]:
        """See RowReader."""
        return (word.encode() for word in row.words)

    def scrubbed(self, row: TaggedWords, scrubber: Scrubber) -> TaggedWords:
        """See RowReader."""
        return row._replace(words=scrubber.words(row.words))

    def labels_of(self, row: TaggedWords) -> Iterable[str]:
        """See RowReader."""
        return (self.labels.names[tag] for tag in row.tags)


@dataclass(frozen=True)
class Templates:
    """What a row's prompt and answer are made of."""

    prompt: str
    answer: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns that a row needs, in order of their first appearance."""
        return tuple(dict.fromkeys(template_fields(self.prompt) + template_fields(self.answer)))

    def filled(self, row: Sequence[str]) -> tuple[str, str]:
        """Return prompt and answer of a row, whose values are those of `fields`."""
        values = dict(zip(self.fields, row, strict=True))
        return fill_template(self.prompt, values), fill_template(self.answer, values)


Fields = tuple[str, ...]  # a row's values of the templates' columns


@dataclass(frozen=True)
class TemplateReader:
    """See RowReader: rows of causal language modelling."""

    templates: Templates
    labels: Labels

    @property
    def selection(self) -> Selection:
        """See RowReader."""
        return Selection(self.templates.fields)

    def row(self, values: Values) -> Fields:
        """See RowReader."""
        row = tuple(_text(value) for value in values)
        if not self.templates.filled(row)[1].strip():
            raise BrokenRow(Cause.INCOMPLETE)
        return row

    def content(self, row: Fields) -> Iterable[bytes]:
        """See RowReader."""
        return (value.encode() for value in row)

    def scrubbed(self, row: Fields, scrubber: Scrubber) -> Fields:
        """See RowReader."""
        return tuple(scrubber.text(value) for value in row)

    def labels_of(self, row: Fields) -> Iterable[str]:
        """See RowReader."""
        return ()


class ArrayRow(NamedTuple):
    """The arrays of a row in the plan's order; and its class, or the values to be learned."""

    arrays: tuple[Floats, ...]
    label: int | Floats


@dataclass(frozen=True)
class ArrayReader:
    """See RowReader: rows of array learning."""

    source: DataSource
    task: ArrayLearning
    labels: Labels

    @property
    def selection(self) -> Selection:
        """See RowReader."""
        mapping = dict(self.source.arrays)
        inputs = tuple(mapping.get(entry.name, (entry.name,)) for entry in self.task.inputs)
        learned: Column = mapping.get(LABELS, (self.source.label,))
        return Selection((*inputs, learned), (*TABLES, *ARCHIVES))

    def row(self, values: Values) -> ArrayRow:
        """See RowReader."""
        *arrays, learned = values
        inputs = zip(self.task.inputs, arrays, strict=True)
        found = tuple(_floats(entry.shape, value) for entry, value in inputs)
        return ArrayRow(found, self._label(learned))

    def _label(self, value: object) -> int | Floats:
        if self.task.values:
            return _floats((self.task.values,), value)
        label = _text(value).strip()
        if not label:
            raise BrokenRow(Cause.INCOMPLETE)
        return self.labels.number(label)

    def content(self, row: ArrayRow) -> Iterable[bytes]:
        """See RowReader."""
        return (array.tobytes() for array in row.arrays)

    def scrubbed(self, row: ArrayRow, scrubber: Scrubber) -> ArrayRow:
        """See RowReader: there is no text in it."""
        return row

    def labels_of(self, row: ArrayRow) -> Iterable[str]:
        """See RowReader."""
        return (self.labels.names[row.label],) if isinstance(row.label, int) else ()


def classified_texts(source: DataSource, labels: Sequence[str]) -> Rows[ClassifiedText]:
    """Return the rows of a source for text classification."""
    return Rows(source, ClassifiedTextReader(source, Labels(labels)))


def read_texts(source: DataSource) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of every usable row, whatever the label; raises Refused as `Rows`."""
    labels = Labels(None)
    for text, number in Rows(source, ClassifiedTextReader(source, labels)):
        yield text, labels.names[number]


def _text(value: object) -> str:
    """Return the value as formats without types hold it; anything else breaks the row."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):  # of a NumPy archive
        value = value.decode(errors="replace")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    # Half a surrogate pair, which JSON can spell, is no text in any encoding.
    if not isinstance(value, str) or _SURROGATE.search(value):
        raise BrokenRow(Cause.INCOMPLETE)
    if len(value) > MAX_FIELD_CHARACTERS:
        raise BrokenRow(Cause.TOO_LARGE)
    return value


def _texts(value: object) -> list[str]:
    """Return a list of words or tags; a format without lists holds JSON, or blanks between."""
    found = listed(value)
    if isinstance(found, str):
        found = found.split()
    if not isinstance(found, list) or not found:
        raise BrokenRow(Cause.INCOMPLETE)
    if len(found) > MAX_WORDS:
        raise BrokenRow(Cause.TOO_LARGE)
    return [_text(word).strip() for word in found]


def listed(value: object) -> object:
    """Return what a text holds as JSON when that is a list, or the value itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _floats(shape: tuple[int, ...], value: object) -> Floats:
    """Return numbers, or texts of numbers, as an array of that shape."""
    found = listed(value)
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(found, np.float32).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise BrokenRow(Cause.NOT_NUMBERS) from None
    if not np.isfinite(array).all():
        raise BrokenRow(Cause.NOT_NUMBERS)
    return array
