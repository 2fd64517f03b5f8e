"""Read this device's data: CSV, JSONL or Parquet in, rows of (text, class) out, one at a time.

What is wrong with a file is said without quoting a text: refusals leave the device.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fedloom.errors import ConfigError, Reason, Refused

MAX_FIELD_CHARACTERS = 1 << 20
MAX_LINE_BYTES = 8 << 20
MAX_LABEL_CHARACTERS = 80  # of a label that a refusal may quote
_PARQUET_BATCH_ROWS = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")

_Fields = tuple[object, object]  # what a file holds as text and as label, not yet checked
_Records = Generator[_Fields | None, None, None]  # None stands for a row that cannot be parsed


@dataclass(frozen=True)
class DataSource:
    """A data file and the columns to read; the ending of the name tells the format.

    `.csv`, `.jsonl` (both also `.gz`) or `.parquet`.
    """

    path: Path
    text: str = "text"
    label: str = "label"


@dataclass(frozen=True)
class Row:
    """One usable row; `label` is the index of its class, `number` counts rows of data from 1."""

    text: str
    label: int
    number: int


class Rows:
    """Iterate over the usable rows of a source, counting the others in `broken`.

    A row is broken when it cannot be parsed, has no text or no label, or is too large. Iterating
    raises Refused: DATA_UNREADABLE, DATA_COLUMN_MISSING, DATA_LABEL_UNKNOWN, or DATA_EMPTY at the
    end when no row was usable; and ConfigError when Parquet support is not installed.
    """

    def __init__(self, source: DataSource, labels: Sequence[str]) -> None:
        self.broken = 0
        self._source = source
        self._classes = {label: index for index, label in enumerate(labels)}
        self._longest_label = max(map(len, labels))

    def __iter__(self) -> Iterator[Row]:
        usable = 0
        self.broken = 0
        for number, record in enumerate(_records(self._source), start=1):
            if (row := _usable(record)) is None:
                self.broken += 1
                continue
            usable += 1
            text, label = row
            yield Row(text, self._class_of(label, number), number)
        if not usable:
            raise Refused(
                Reason.DATA_EMPTY,
                f"expected rows with a text and a label in {self._source.path.name}, "
                f"found none and {self.broken} broken rows",
            )

    def _class_of(self, label: str, number: int) -> int:
        index = self._classes.get(label)
        if index is None:
            raise Refused(
                Reason.DATA_LABEL_UNKNOWN,
                f"expected one of the plan's {len(self._classes)} labels, "
                f"found {self._quoted(label)} in row {number} of {self._source.path.name}",
            )
        return index

    def _quoted(self, label: str) -> str:
        # Something much longer than every label is a text: the columns were mapped the wrong way
        # round, and a text must not leave the device.
        if len(label) > 2 * self._longest_label + 8:
            return f"a value of {len(label)} characters"
        return repr(label[:MAX_LABEL_CHARACTERS])


def read_texts(source: DataSource) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of every usable row, whatever the label; raises Refused as `Rows`."""
    for record in _records(source):
        if (row := _usable(record)) is not None:
            yield row


def _usable(record: _Fields | None) -> tuple[str, str] | None:
    text, label = (None, None) if record is None else map(_as_text, record)
    if not text or not label or len(text) > MAX_FIELD_CHARACTERS:
        return None
    return text, label


class _BrokenLineError(Exception):
    """A line is longer than any that is read into memory."""


class _Lines:
    """The lines of a UTF-8 stream; goes on after a line that was too long."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._first = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := self._stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            raise _BrokenLineError
        encoding = "utf-8-sig" if self._first else "utf-8"
        self._first = False
        return line.decode(encoding)


def _records(source: DataSource) -> _Records:
    """Parse the file; whatever stops that is a refusal that names the file and the row."""
    path = source.path
    number = 0  # of the row before the one that is being read
    try:
        for record in _parser(source):
            number += 1
            yield record
    except UnicodeDecodeError:
        # `from None`: the error carries the bytes of the line.
        raise Refused(
            Reason.DATA_UNREADABLE,
            f"expected UTF-8 text in {path.name}, found other bytes after row {number}",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or f"damaged after row {number}"
        raise Refused(
            Reason.DATA_UNREADABLE, f"expected to read {path.name}, found: {problem}"
        ) from error


def _parser(source: DataSource) -> _Records:
    name = source.path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_records(source)
    plain = name.removesuffix(".gz")
    if plain.endswith(".csv"):
        return _csv_records(source)
    if plain.endswith(".jsonl"):
        return _jsonl_records(source)
    raise Refused(
        Reason.DATA_UNREADABLE,
        f"expected a name ending in .csv, .jsonl (or these with .gz) or .parquet, "
        f"found {source.path.name}",
    )


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _csv_records(source: DataSource) -> _Records:
    # The default limit of 128 KiB per field is the only other one; the setting is the process's.
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with _open(source.path) as stream:
        reader = csv.reader(_Lines(stream))
        try:
            header = [name.strip() for name in next(reader, [])]
        except (csv.Error, _BrokenLineError):
            header = []
        text, label = _columns(source, header)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except (csv.Error, _BrokenLineError):
                yield None
                continue
            if len(fields) == len(header):
                yield fields[text], fields[label]
            elif fields:  # an empty line is not a row
                yield None


def _jsonl_records(source: DataSource) -> _Records:
    with _open(source.path) as stream:
        lines = _Lines(stream)
        columns_known = False
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except _BrokenLineError:
                yield None
                continue
            if not line.strip():
                continue
            value = _json_object(line)
            if value is None:
                yield None
                continue
            if not columns_known:  # the first object stands for all, as a header does
                _columns(source, list(value))
                columns_known = True
            yield value.get(source.text), value.get(source.label)


def _json_object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also an integer of too many digits
        return None
    return value if isinstance(value, dict) else None


def _parquet_records(source: DataSource) -> _Records:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            str(source.path), 'reading Parquet needs: pip install "fedloom[parquet]"'
        ) from error
    try:
        with source.path.open("rb") as stream, pq.ParquetFile(stream) as file:
            _columns(source, file.schema_arrow.names)
            wanted = list(dict.fromkeys((source.text, source.label)))
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted):
                texts, labels = (batch.column(c).to_pylist() for c in (source.text, source.label))
                yield from zip(texts, labels, strict=True)
    except pa.ArrowException as error:
        raise Refused(
            Reason.DATA_UNREADABLE,
            f"expected a Parquet file in {source.path.name}, found other or damaged content",
        ) from error


def _columns(source: DataSource, found: list[str]) -> tuple[int, int]:
    """Return the positions of the text and of the label, or refuse and name what is there."""
    for column in (source.text, source.label):
        if column in found:
            continue
        # In a file without a header the first row stands here: only plain words are quoted.
        names = [name for name in found if _PLAIN_NAME.fullmatch(name)][:16]
        others = f" and {len(found) - len(names)} more" if len(found) > len(names) else ""
        raise Refused(
            Reason.DATA_COLUMN_MISSING,
            f"expected a column {column[:40]!r} in {source.path.name}, "
            f"found: {', '.join(names) or 'no plain name'}{others}",
        )
    return found.index(source.text), found.index(source.label)


def _as_text(value: object) -> str | None:
    """Return the value as formats without types hold it; None for what is no text or label."""
    if isinstance(value, str):
        # Half a surrogate pair, which JSON can spell, is no text in any encoding.
        return None if _SURROGATE.search(value) else value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return None
