"""Data files as records: CSV, JSONL, Parquet, CoNLL text and NumPy archives, one row at a time.

A row that cannot be read is a Cause in its place; a file that cannot is a refusal, which says what
is wrong without quoting a text: refusals leave the device.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from edge_agent.columns import Column, Names, Place, column_names, column_places, flat
from edge_agent.npz import npz_keys, npz_rows
from edge_agent.reports import Cause
from fedloom.errors import ConfigError, Reason, Refused

MAX_FIELD_CHARACTERS = 1 << 20
MAX_LINE_BYTES = 8 << 20
MAX_WORDS = 1 << 16  # of one text
TABLES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
ARCHIVES = (".npz",)
WORD_LISTS = (".conll", ".bio", ".iob", ".txt")
_PARQUET_BATCH_ROWS = 1024

Values = tuple[object, ...]  # a record's, one for each Column; a list where that is a tuple
_Records = Generator[Values | Cause, None, None]


class Record(NamedTuple):
    """One row; `number` counts the rows of its file from 1."""

    file: str
    number: int
    values: Values | Cause


@dataclass(frozen=True)
class Selection:
    """What to read of each row; with `endings` the formats that can hold it."""

    columns: tuple[Column, ...]
    endings: tuple[str, ...] = TABLES


def data_files(path: Path, endings: Sequence[str]) -> list[Path]:
    """Return the file, or a folder's files of these formats by name; hidden ones do not count."""
    if not path.is_dir():
        return [path]
    names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = sorted(
        name
        for name in names
        if name.name.lower().endswith(tuple(endings))
        and not any(part.startswith(".") for part in name.parts)
    )
    if not files:
        raise Refused(
            Reason.DATA_UNREADABLE,
            f"expected files ending in {', '.join(endings)} in {path.name}, found none",
        )
    return [path / name for name in files]


def records(path: Path, selection: Selection) -> Iterator[Record]:
    """Yield all rows of a file or folder.

    Raises Refused (DATA_UNREADABLE, DATA_COLUMN_MISSING) that names the file, and ConfigError when
    Parquet support is not installed.
    """
    for file in data_files(path, selection.endings):
        yield from _file_records(file, selection)


def _file_records(path: Path, selection: Selection) -> Iterator[Record]:
    number = 0  # of the row before the one that is being read
    try:
        for values in _parser(path, selection):
            number += 1
            yield Record(path.name, number, values)
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or f"damaged after row {number}"
        raise Refused(
            Reason.DATA_UNREADABLE, f"expected to read {path.name}, found: {problem}"
        ) from error


def _parser(path: Path, selection: Selection) -> _Records:
    name = path.name.lower()
    if not name.endswith(selection.endings):
        raise Refused(
            Reason.DATA_UNREADABLE,
            f"expected a name ending in {', '.join(selection.endings)}, found {path.name}",
        )
    if name.endswith(".parquet"):
        return _parquet_records(path, selection.columns)
    if name.endswith(".npz"):
        return _npz_records(path, selection.columns)
    if name.endswith(WORD_LISTS):
        return _word_records(path)
    if name.removesuffix(".gz").endswith(".csv"):
        return _csv_records(path, selection.columns)
    return _jsonl_records(path, selection.columns)


class _BrokenLineError(Exception):
    """A line that cannot be read; the next one can."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


class _Lines:
    """The lines of a UTF-8 stream; goes on after one that was broken."""

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
            raise _BrokenLineError(Cause.TOO_LARGE)
        encoding = "utf-8-sig" if self._first else "utf-8"
        self._first = False
        try:
            return line.decode(encoding)
        except UnicodeDecodeError:
            # `from None`: the error carries the bytes of the line.
            raise _BrokenLineError(Cause.NOT_UTF8) from None


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _csv_records(path: Path, columns: Sequence[Column]) -> _Records:
    # The default limit of 128 KiB per field is the only other one; the setting is the process's.
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with _open(path) as stream:
        reader = csv.reader(_Lines(stream))
        try:
            header = [name.strip() for name in next(reader, [])]
        except (csv.Error, _BrokenLineError):
            header = []
        places = column_places(path, columns, header)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield Cause.UNPARSABLE
                continue
            except _BrokenLineError as broken:
                yield broken.cause
                continue
            if len(fields) == len(header):
                yield tuple(_taken(fields, place) for place in places)
            elif fields:  # an empty line is not a row
                yield Cause.UNPARSABLE


def _taken(fields: Sequence[object], place: Place) -> object:
    return fields[place] if isinstance(place, int) else [fields[one] for one in place]


def _jsonl_records(path: Path, columns: Sequence[Column]) -> _Records:
    with _open(path) as stream:
        lines = _Lines(stream)
        names: list[Names] | None = None
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except _BrokenLineError as broken:
                yield broken.cause
                continue
            if not line.strip():
                continue
            value = _json_object(line)
            if value is None:
                yield Cause.UNPARSABLE
                continue
            if names is None:  # the first object stands for all, as a header does
                names = column_names(path, columns, list(value))
            yield tuple(
                value.get(name) if isinstance(name, str) else [value.get(one) for one in name]
                for name in names
            )


def _json_object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also an integer of too many digits
        return None
    return value if isinstance(value, dict) else None


def _word_records(path: Path) -> _Records:
    """CoNLL text: a word and its tag on each line, an empty line after each text.

    Of more columns the first and the last count. `-DOCSTART-` and, before a text's first word,
    comments (`# ` and more than one word) are passed over.
    """
    words: list[str] = []
    tags: list[str] = []
    broken: Cause | None = None
    with _open(path) as stream:
        lines = _Lines(stream)
        while True:
            try:
                line: str | None = next(lines, None)
            except _BrokenLineError as error:
                broken = broken or error.cause
                continue
            if line is not None and line.strip():
                fields = line.strip("\r\n").split("\t") if "\t" in line else line.split()
                if broken is None and (words or not _is_heading(fields)):
                    words.append(fields[0])
                    tags.append(fields[-1])
                    broken = _word_problem(fields, words)
                continue
            if words or broken:
                yield broken or (words, tags)
                words, tags, broken = [], [], None
            if line is None:
                return


def _is_heading(fields: list[str]) -> bool:
    return fields[0] == "-DOCSTART-" or (fields[0] == "#" and len(fields) > 2)


def _word_problem(fields: list[str], words: list[str]) -> Cause | None:
    if len(fields) < 2:
        return Cause.UNPARSABLE
    return Cause.TOO_LARGE if len(words) > MAX_WORDS else None


def _parquet_records(path: Path, columns: Sequence[Column]) -> _Records:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            str(path), 'reading Parquet needs: pip install "fedloom[parquet]"'
        ) from error
    try:
        # Without `pre_buffer`, which holds a whole row group, memory is that of a batch.
        with path.open("rb") as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
            names = column_names(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=flat(names)):
                table = [
                    batch.column(name).to_pylist()
                    if isinstance(name, str)
                    else list(zip(*(batch.column(one).to_pylist() for one in name), strict=True))
                    for name in names
                ]
                yield from zip(*table, strict=True)
    except pa.ArrowException as error:
        raise Refused(
            Reason.DATA_UNREADABLE,
            f"expected a Parquet file in {path.name}, found other or damaged content",
        ) from error


def _npz_records(path: Path, columns: Sequence[Column]) -> _Records:
    names = column_names(path, columns, npz_keys(path))
    for row in npz_rows(path, flat(names)):
        yield tuple(
            row[name] if isinstance(name, str) else [row[one] for one in name] for name in names
        )
