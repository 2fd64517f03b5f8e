"""An adapter file is safetensors for everyone, and a fixed offset followed by theta for us."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.adapters import (
    adapter_header,
    read_adapter,
    read_annotated_adapter,
    write_adapter,
)
from fedloom.errors import Reason, Refused
from fedloom.plans import TrainableTensor

LAYOUT = (
    TrainableTensor("base.query.lora_A.weight", (2, 3), 0),
    TrainableTensor("base.query.lora_B.weight", (3, 2), 6),
    TrainableTensor("classifier.bias é", (5,), 12),
)
SIZE = 17
_theta = st.lists(
    st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=SIZE, max_size=SIZE
).map(lambda values: np.array(values, np.float32))


@given(_theta)
def test_theta_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, theta: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("adapter") / "adapter_model.safetensors"
    write_adapter(path, LAYOUT, theta)
    found = read_adapter(path, LAYOUT)
    assert found.dtype == np.float32
    assert found.tobytes() == theta.tobytes()


@given(_theta)
def test_theta_starts_at_the_same_place_whatever_its_values(
    tmp_path_factory: pytest.TempPathFactory, theta: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("adapter") / "adapter_model.safetensors"
    write_adapter(path, LAYOUT, theta)
    header = adapter_header(LAYOUT)
    assert path.read_bytes() == header + theta.astype("<f4").tobytes()
    assert len(header) % 64 == 0


def test_the_safetensors_library_reads_names_and_shapes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is in `plan`")
    path = tmp_path / "adapter_model.safetensors"
    theta = np.arange(SIZE, dtype=np.float32)
    write_adapter(path, LAYOUT, theta)
    found = safetensors.load_file(path)
    assert set(found) == {tensor.name for tensor in LAYOUT}
    for tensor in LAYOUT:
        expected = theta[tensor.offset : tensor.offset + tensor.size].reshape(tensor.shape)
        np.testing.assert_array_equal(found[tensor.name], expected, strict=True)


def test_a_new_adapter_replaces_the_old_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    write_adapter(path, LAYOUT, np.zeros(SIZE, np.float32))
    write_adapter(path, LAYOUT, np.ones(SIZE, np.float32))
    assert read_adapter(path, LAYOUT).tolist() == [1.0] * SIZE
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def _other_shape() -> bytes:
    return adapter_header((TrainableTensor("base.query.lora_A.weight", (SIZE,), 0),))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        adapter_header(LAYOUT)[:-1],
        adapter_header(LAYOUT) + bytes(4 * SIZE - 1),
        adapter_header(LAYOUT) + bytes(4 * SIZE + 1),
        bytes(len(adapter_header(LAYOUT)) + 4 * SIZE),
        adapter_header(LAYOUT).replace(b"query", b"value") + bytes(4 * SIZE),
        _other_shape() + bytes(4 * SIZE),
    ],
    ids=["empty", "no theta", "short", "long", "zeros", "foreign names", "other shape"],
)
def test_a_truncated_or_foreign_file_is_malformed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match=path.name) as caught:
        read_adapter(path, LAYOUT)
    assert caught.value.reason is Reason.MALFORMED


_notes = st.dictionaries(st.text(max_size=20), st.text(max_size=60), min_size=1, max_size=5)


@given(_theta, _notes)
def test_notes_travel_with_theta(
    tmp_path_factory: pytest.TempPathFactory, theta: np.ndarray, notes: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("adapter") / "state.safetensors"
    write_adapter(path, LAYOUT, theta, notes)
    found, noted = read_annotated_adapter(path, LAYOUT)
    assert (found.tobytes(), noted) == (theta.tobytes(), notes)
    with pytest.raises(Refused):  # what an ONNX graph takes theta from has none
        read_adapter(path, LAYOUT)


def test_the_safetensors_library_reads_an_annotated_adapter(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is in `plan`")
    path = tmp_path / "state.safetensors"
    write_adapter(path, LAYOUT, np.arange(SIZE, dtype=np.float32), {"round": "7"})
    with safetensors.safe_open(path, "numpy") as found:
        assert found.metadata() == {"round": "7"}
        assert set(found.keys()) == {tensor.name for tensor in LAYOUT}


@pytest.mark.parametrize("notes", [b"", b"[]", b"{}", b'{"__metadata__":[]}', b"\xff", b"{" * 99])
def test_an_adapter_whose_notes_are_not_ours_is_refused(tmp_path: Path, notes: bytes) -> None:
    path = tmp_path / "state.safetensors"
    for length in (len(notes), 1 << 63):
        path.write_bytes(length.to_bytes(8, "little") + notes + bytes(4 * SIZE))
        with pytest.raises(Refused) as refused:
            read_annotated_adapter(path, LAYOUT)
        assert refused.value.reason is Reason.MALFORMED
