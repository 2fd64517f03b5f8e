"""Data files: the formats agree, and what is wrong with one is a refusal that quotes no text."""

import contextlib
import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_agent import records
from edge_agent.data import DataSource
from edge_agent.reports import Cause
from edge_agent.row_readers import ClassifiedText, classified_texts
from fedloom.errors import ConfigError, Reason, Refused

LABELS = ("yes", "no", "1")
PRIVATE_TEXT = "my doctor said it is benign"  # stands for a text, which must never leave the device


def _csv_bytes(columns: tuple[str, str], rows: list[tuple[str, str]]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([columns, *rows])
    return file.getvalue().encode()


def _jsonl_bytes(columns: tuple[str, str], rows: list[tuple[str, str]]) -> bytes:
    return b"".join(
        json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False).encode() + b"\n"
        for row in rows
    )


def _parquet_bytes(columns: tuple[str, str], rows: list[tuple[str, str]]) -> bytes:
    file = io.BytesIO()
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
    pq.write_table(table, file)
    return file.getvalue()


FORMATS: dict[str, Callable[[tuple[str, str], list[tuple[str, str]]], bytes]] = {
    ".csv": _csv_bytes,
    ".jsonl": _jsonl_bytes,
    ".parquet": _parquet_bytes,
    ".csv.gz": lambda columns, rows: gzip.compress(_csv_bytes(columns, rows)),
    ".jsonl.gz": lambda columns, rows: gzip.compress(_jsonl_bytes(columns, rows)),
}
ROWS = [("Is it on?", "yes"), ('"quoted", and\nbroken', "no"), ("Grüße, 你好", "1")]

every_format = pytest.mark.parametrize("ending", FORMATS)


def _write(path: Path, content: bytes | str) -> DataSource:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataSource(path)


def _refusal(source: DataSource) -> Refused:
    with pytest.raises(Refused) as caught:
        list(classified_texts(source, LABELS))
    assert PRIVATE_TEXT not in str(caught.value)
    return caught.value


@every_format
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data{ending}"
    path.write_bytes(FORMATS[ending](("utterance", "intent"), ROWS))
    rows = classified_texts(DataSource(path, text="utterance", label="intent"), LABELS)
    assert list(rows) == [ClassifiedText(text, i) for i, (text, _) in enumerate(ROWS)]
    assert (rows.report.rows, rows.report.broken_rows) == (len(ROWS), 0)
    assert rows.report.labels == dict.fromkeys(LABELS, 1)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from(LABELS)
        ),
        min_size=1,
        max_size=8,
    )
)
@example([("\ufeff", "yes"), ("\x00\r", "no"), ("a\rb\n", "no")])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_texts_are_the_formats_agree(
    tmp_path: Path, rows: list[tuple[str, str]]
) -> None:
    expected = [(text.strip(), LABELS.index(label)) for text, label in rows if text.strip()]
    for ending, encode in FORMATS.items():
        path = tmp_path / f"data{ending}"
        path.write_bytes(encode(("text", "label"), rows))
        found = classified_texts(DataSource(path), LABELS)
        values: list[tuple[str, int]] = []
        with contextlib.nullcontext() if expected else pytest.raises(Refused, match="DATA_EMPTY"):
            values.extend(found)
        broken = found.report.broken_rows
        assert (values, broken) == (expected, len(rows) - len(expected)), ending


def test_labels_may_be_integers(tmp_path: Path) -> None:
    source = _write(tmp_path / "d.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1.0}')
    assert [row.label for row in classified_texts(source, LABELS)] == [2, 2]


def test_broken_rows_are_counted_and_passed_over(tmp_path: Path) -> None:
    huge = "x" * (records.MAX_FIELD_CHARACTERS + 1)
    tables: dict[str, tuple[str, dict[Cause, int]]] = {
        "d.csv": (
            f"\ufefftext,label\na,yes\nb\n,yes\nc,\n{huge},yes\nd,e,f\n\n\udcff,no\nz,no\n",
            {Cause.UNPARSABLE: 3, Cause.INCOMPLETE: 2, Cause.NOT_UTF8: 1},
        ),
        "d.jsonl": (
            '{"text": "a", "label": "yes"}\nnot json\n[1]\n{"text": "b"}\n'
            '{"text": ["c"], "label": "no"}\n{"text": "\\ud800", "label": "no"}\n\n'
            f'{{"text": "{huge}", "label": "no"}}\n{{"text": "\udcff", "label": "no"}}\n'
            '{"text": "z", "label": "no"}',
            {Cause.UNPARSABLE: 2, Cause.INCOMPLETE: 3, Cause.TOO_LARGE: 1, Cause.NOT_UTF8: 1},
        ),
    }
    for name, (content, causes) in tables.items():
        source = _write(tmp_path / name, content.encode(errors="surrogateescape"))
        rows = classified_texts(source, LABELS)
        assert [row.text for row in rows] == ["a", "z"]
        assert rows.report.broken == causes


def test_a_line_too_long_to_hold_is_a_broken_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 64)
    for name, header, first, last in (
        ("d.csv", "text,label\n", "a,yes", "z,no"),
        ("d.jsonl", "", '{"text": "a", "label": "yes"}', '{"text": "z", "label": "no"}'),
    ):
        source = _write(tmp_path / name, f"{header}{first}\n{'x' * 1000}\n{last}\n")
        rows = classified_texts(source, LABELS)
        assert [row.text for row in rows] == ["a", "z"]
        assert rows.report.broken == {Cause.TOO_LARGE: 1}


@every_format
def test_a_missing_column_is_named_with_those_found(tmp_path: Path, ending: str) -> None:
    source = _write(tmp_path / f"d{ending}", FORMATS[ending](("utterance", "label"), ROWS))
    refused = _refusal(source)
    assert refused.reason is Reason.DATA_COLUMN_MISSING
    assert "'text'" in refused.subject
    assert "utterance, label" in refused.subject


def test_a_file_without_a_header_does_not_give_its_first_row_away(tmp_path: Path) -> None:
    refused = _refusal(_write(tmp_path / "d.csv", f"{PRIVATE_TEXT},no\nsome other text,yes\n"))
    assert refused.reason is Reason.DATA_COLUMN_MISSING


@every_format
def test_an_unknown_label_is_named_with_its_row(tmp_path: Path, ending: str) -> None:
    rows = [(PRIVATE_TEXT, "yes"), (PRIVATE_TEXT, "maybe")]
    refused = _refusal(_write(tmp_path / f"d{ending}", FORMATS[ending](("text", "label"), rows)))
    assert refused.reason is Reason.DATA_LABEL_UNKNOWN
    assert "'maybe' in row 2 of d" in refused.subject


def test_a_text_in_the_place_of_the_label_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(_csv_bytes(("text", "label"), [(PRIVATE_TEXT, "yes")]))
    refused = _refusal(DataSource(path, text="label", label="text"))
    assert refused.reason is Reason.DATA_LABEL_UNKNOWN
    assert "row 1" in refused.subject


@every_format
def test_a_file_without_usable_rows_is_refused(tmp_path: Path, ending: str) -> None:
    content = FORMATS[ending](("text", "label"), [("", "yes"), (" ", "no")])
    refused = _refusal(_write(tmp_path / f"d{ending}", content))
    assert refused.reason is Reason.DATA_EMPTY
    assert "2 broken rows" in refused.subject


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv.gz", b"not gzip"),
        ("cut.csv.gz", gzip.compress(_csv_bytes(("text", "label"), ROWS * 99))[:-9]),
        ("d.parquet", b"not parquet"),
        ("d.txt", b"text,label\na,yes\n"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    assert _refusal(_write(tmp_path / name, content)).reason is Reason.DATA_UNREADABLE


@every_format
def test_a_file_that_is_not_there_is_refused_by_its_name_alone(tmp_path: Path, ending: str) -> None:
    refused = _refusal(DataSource(tmp_path / f"none{ending}"))
    assert refused.reason is Reason.DATA_UNREADABLE
    assert f"none{ending}" in refused.subject
    assert str(tmp_path) not in refused.subject


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, ending: str) -> None:
    content = FORMATS[ending](("text", "label"), [(PRIVATE_TEXT, "yes")]).decode()
    refused = _refusal(_write(tmp_path / f"d{ending}", content.encode("utf-16")))
    assert refused.reason in (Reason.DATA_COLUMN_MISSING, Reason.DATA_EMPTY)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(tmp_path / "d.parquet", _parquet_bytes(("text", "label"), ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'pip install "fedloom\[parquet\]"'):
        list(classified_texts(source, LABELS))
