"""An adapter as a file: PEFT's tensors in one safetensors file whose data part is theta itself.

The header depends on the layout alone, so theta always starts at the same offset: the ONNX graphs
of a plan take it from there as external data, and replacing the file replaces the adapter. Format:
huggingface/safetensors README, "Format".
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused
from fedloom.plans import TrainableTensor

Theta = NDArray[np.float32]  # (P,) every trainable value, in layout order
_ALIGNMENT = 64  # bytes; theta is aligned for memory mapping
_LENGTH = struct.Struct("<Q")  # of the header's text
_NOTES = "__metadata__"
_MAX_NOTES_BYTES = 4096


def adapter_header(
    layout: tuple[TrainableTensor, ...], notes: Mapping[str, str] | None = None
) -> bytes:
    """Return everything that stands before theta; its length is theta's offset in the file.

    `notes` stand in the format's `__metadata__`. They move theta: an adapter that a graph takes its
    theta from has none.
    """
    entries: dict[str, object] = {_NOTES: dict(notes)} if notes else {}
    for tensor in layout:
        entries[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [4 * tensor.offset, 4 * (tensor.offset + tensor.size)],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def write_adapter(
    path: Path,
    layout: tuple[TrainableTensor, ...],
    theta: Theta,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter so that a reader sees the old file or the whole new one.

    It is on the disk before it has its name, so that a power cut leaves no half of it either.
    """
    write_vectors(path, layout, (theta,), notes)


def write_vectors(
    path: Path,
    layout: tuple[TrainableTensor, ...],
    vectors: Sequence[Theta],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a file whose data part is these vectors, one after another; as `write_adapter`."""
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(adapter_header(layout, notes))
        for vector in vectors:
            file.write(np.ascontiguousarray(vector, "<f4").data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_adapter(path: Path, layout: tuple[TrainableTensor, ...]) -> Theta:
    """Read theta; raises Refused(MALFORMED) unless header and length are the layout's."""
    return _read(path, layout, None)


def read_annotated_adapter(
    path: Path, layout: tuple[TrainableTensor, ...]
) -> tuple[Theta, dict[str, str]]:
    """Read theta and the notes that were written with it; raises Refused(MALFORMED)."""
    notes = _notes(path, len(adapter_header(layout)) + _MAX_NOTES_BYTES)
    return _read(path, layout, notes), notes


def _notes(path: Path, limit: int) -> dict[str, str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH.size), "little")
        text = file.read(min(length, limit))
    try:
        notes = json.loads(text)[_NOTES]
        return {str(name): str(value) for name, value in notes.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(Reason.MALFORMED, f"expected {path.name} with notes in its header") from error


def _read(
    path: Path, layout: tuple[TrainableTensor, ...], notes: Mapping[str, str] | None
) -> Theta:
    header = adapter_header(layout, notes)
    expected = len(header) + 4 * (layout[-1].offset + layout[-1].size)
    with path.open("rb") as file:
        found = path.stat().st_size
        if found != expected or file.read(len(header)) != header:
            raise Refused(
                Reason.MALFORMED,
                f"expected {path.name} with this plan's header and {expected} bytes, found {found}",
            )
        return np.fromfile(file, "<f4").astype(np.float32, copy=False)
