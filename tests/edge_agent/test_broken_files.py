"""Fuzz: whatever bytes a file holds, reading it ends in rows, counted causes, or a refusal."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.data import DataSource
from edge_agent.row_readers import (
    ArrayReader,
    ClassifiedTextReader,
    TaggedWordReader,
    TemplateReader,
    Templates,
)
from edge_agent.rows import Labels, RowReader, Rows
from fedloom.errors import Refused
from fedloom.tasks import ArrayInput, ArrayLearning

SECRET = "my doctor said it is benign"  # noqa: S105 - stands for a text
NUMBERS = ArrayLearning((ArrayInput("x", (2,)),), ("0", "1"))


def _parquet() -> bytes:
    file = io.BytesIO()
    rows = {"text": [SECRET] * 9, "label": ["a"] * 9, "x": [[1.0, 2.0]] * 9}
    words = {"words": [SECRET.split()] * 9, "tags": [["O"] * 6] * 9}
    pq.write_table(pa.table(rows | words), file)
    return file.getvalue()


def _npz(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, x=np.ones((9, 2), np.float32), label=np.arange(9) % 2)
    return file.getvalue()


CSV = f'text,label,words,tags,x\n{SECRET},a,b c,O O,"[1, 2]"\n'.encode()
JSONL = b'{"text": "%s", "label": "0", "words": ["a"], "tags": ["O"], "x": [1, 2]}\n' % (
    SECRET.encode()
)
WHOLE = {
    ".csv": CSV * 3,
    ".csv.gz": gzip.compress(CSV * 3),
    ".jsonl": JSONL * 3,
    ".parquet": _parquet(),
    ".npz": _npz(np.savez),
    "z.npz": _npz(np.savez_compressed),
    ".conll": f"{SECRET.replace(' ', ' O' + chr(10))} O\n\na O\n".encode(),
}
edits = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["flip", "cut", "insert", "repeat"])),
    min_size=1,
    max_size=4,
)


def readers(source: DataSource) -> list[RowReader]:
    return [
        ClassifiedTextReader(source, Labels(None)),
        TaggedWordReader(source, Labels(None)),
        TemplateReader(Templates("{text}", "{label}"), Labels(())),
        ArrayReader(source, NUMBERS, Labels(None)),
    ]


def outcome(rows: Rows) -> tuple[int, str]:
    """Return the number of rows, and what ended them if anything did."""
    found = 0
    try:
        for _ in rows:
            found += 1
    except Refused as refused:
        return found, str(refused)
    return found, ""


def damaged(content: bytes, changes: list[tuple[int, str]], noise: bytes) -> bytes:
    for place, change in changes:
        at = place % (len(content) + 1)
        match change:
            case "flip":
                content = (
                    content[:at]
                    + bytes(b ^ 0x55 for b in content[at : at + 1])
                    + (content[at + 1 :])
                )
            case "cut":
                content = content[:at]
            case "insert":
                content = content[:at] + noise + content[at:]
            case _:
                content = content[:at] + content[max(0, at - 40) :]
    return content


@pytest.mark.parametrize("ending", WHOLE)
@given(edits, st.binary(max_size=30))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_gives_rows_or_a_refusal_that_quotes_none(
    tmp_path: Path, ending: str, changes: list[tuple[int, str]], noise: bytes
) -> None:
    path = tmp_path / f"d{ending}"
    path.write_bytes(damaged(WHOLE[ending], changes, noise))
    for reader in readers(DataSource(path)):
        rows = Rows(DataSource(path), reader)
        found, refusal = outcome(rows)
        assert "doctor" not in refusal
        assert found == rows.report.rows
        assert found or refusal
