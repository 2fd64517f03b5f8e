"""Safetensors files of ours are everyone's: the format's own library reads and writes them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from fedloom.errors import Reason, Refused
from fedloom.tensor_files import read_tensors, write_tensors

KINDS = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "u1", "?")
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=5)
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    st.sampled_from(KINDS).flatmap(lambda kind: arrays.arrays(kind, SHAPES)),
    min_size=1,
    max_size=6,
)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == values.dtype
        and found[name].shape == values.shape
        and found[name].tobytes() == values.tobytes()
        for name, values in expected.items()
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors") / "some.safetensors"


@given(tensors=TENSORS)
def test_both_sides_of_the_format_agree(file: Path, tensors: dict[str, np.ndarray]) -> None:
    places = write_tensors(file, tensors)
    assert same(load_file(file), tensors)
    data = file.read_bytes()
    for name, values in tensors.items():
        offset, size = places[name]
        assert data[offset : offset + size] == values.tobytes()
        assert offset % values.dtype.itemsize == 0
    save_file(tensors, file)
    assert same(read_tensors(file), tensors)


def test_a_damaged_file_is_refused(file: Path) -> None:
    write_tensors(file, {"a": np.arange(9, dtype=np.float32)})
    whole = file.read_bytes()
    for damaged in (b"", whole[:7], whole[:40], whole[:-1], b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(Refused) as caught:
            read_tensors(file)
        assert caught.value.reason is Reason.MALFORMED
