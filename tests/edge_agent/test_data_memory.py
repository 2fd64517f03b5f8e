"""Memory does not grow with the number of rows: only a block of them is ever held."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_agent.batches import Examples
from edge_agent.data import DataSource, Treatment
from edge_agent.examples import read_examples
from fedloom.plans import Plan, PlanOrigin, TrainableTensor
from fedloom.tasks import ArrayInput, ArrayLearning
from tests.edge_agent.toy import Toy, toy_rows

MEBIBYTE = 1 << 20


def peak_of(folder: Path, plan: Plan, path: Path) -> tuple[Examples, int]:
    """Read a file as an agent does; return its examples and the most memory, in bytes."""
    source = DataSource(path, treatment=Treatment(kept_in=path.with_name(f"{path.stem}-kept")))
    tracemalloc.start()
    try:
        examples, _ = read_examples(folder, plan, source)
        return examples, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_arrays_of_200_megabytes_are_read_and_used_in_a_few(tmp_path: Path) -> None:
    rows, values = 12_500, 4_096
    path = tmp_path / "d.npz"
    x = np.arange(rows * values, dtype=np.float32).reshape(rows, values)
    np.savez(path, x=x, label=np.arange(rows) % 2)
    task = ArrayLearning((ArrayInput("x", (values,)),), ("0", "1"))
    plan = Plan("test", (), (TrainableTensor("w", (1,), 0),), task, PlanOrigin("test"))
    assert path.stat().st_size > 200 * 10**6
    examples, peak = peak_of(tmp_path, plan, path)
    assert peak < 8 * MEBIBYTE
    some = np.array([rows - 1, 0, 7_777])
    tracemalloc.start()
    np.testing.assert_array_equal(examples.inputs(some)["x"], x[some])
    assert tracemalloc.get_traced_memory()[1] < MEBIBYTE
    tracemalloc.stop()


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_ten_times_as_many_texts_take_the_same_memory(
    toy: Toy, tmp_path: Path, ending: str
) -> None:
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}{ending}"
        with path.open("w") as file:
            if ending == ".csv":
                file.write("text,label\n")
            for text, label in toy_rows(count, seed=1):
                row = json.dumps({"text": text, "label": label}) + "\n"
                file.write(f"{text},{label}\n" if ending == ".csv" else row)
        examples, peak = peak_of(toy.folder, toy.plan, path)
        assert len(examples) == count
        peaks.append(peak)
    assert peaks[1] < 1.3 * peaks[0]
