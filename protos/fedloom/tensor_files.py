"""Safetensors files of several element types: read by mapping, written one tensor after another.

Format: huggingface/safetensors README, "Format". An adapter, whose layout is a plan's, is
`fedloom.adapters`'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused

Array = NDArray[Any]
_TYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "|b1",
}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_ALIGNMENT = 64  # bytes, of the data part: for memory mapping
_MAX_HEADER = 100 << 20  # the format's own limit


def read_tensors(path: Path) -> dict[str, Array]:
    """Map the tensors of a file by name, those of element types that numpy lacks left out.

    Raises Refused(MALFORMED) when the file is not what its header says.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + min(length, _MAX_HEADER)].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + length :]
        return {
            name: _tensor(body, entry) for name, entry in header.items() if entry["dtype"] in _TYPES
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(Reason.MALFORMED, f"expected {path.name} to be safetensors") from error


def _tensor(body: Array, entry: Mapping[str, Any]) -> Array:
    start, end = entry["data_offsets"]
    values: Array = body[start:end].view(_TYPES[entry["dtype"]])  # fails for half an element
    return values.reshape(entry["shape"])


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> dict[str, tuple[int, int]]:
    """Write tensors, widest elements first; return where each lies in the file: (offset, bytes).

    So each starts at a multiple of its element's size, without the gaps that the format forbids.
    """
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)
    entries: dict[str, object] = {}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for name, values in ordered:
        entries[name] = {
            "dtype": _NAMES[values.dtype.newbyteorder("<")],
            "shape": list(values.shape),
            "data_offsets": [position, position + values.nbytes],
        }
        places[name] = (position, values.nbytes)
        position += values.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in ordered:
            file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
    start = 8 + len(text)
    return {name: (start + offset, size) for name, (offset, size) in places.items()}
