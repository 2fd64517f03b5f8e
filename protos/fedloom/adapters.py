"""An adapter as a file: PEFT's tensors in one safetensors file whose data part is theta itself.

The header depends on the layout alone, so theta always starts at the same offset: the ONNX graphs
of a plan take it from there as external data, and replacing the file replaces the adapter. Format:
huggingface/safetensors README, "Format".
"""

import json
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused
from fedloom.plans import TrainableTensor

Theta = NDArray[np.float32]  # (P,) every trainable value, in layout order
_ALIGNMENT = 64  # bytes; theta is aligned for memory mapping


def adapter_header(layout: tuple[TrainableTensor, ...]) -> bytes:
    """Return everything that stands before theta; its length is theta's offset in the file."""
    entries = {
        tensor.name: {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [4 * tensor.offset, 4 * (tensor.offset + tensor.size)],
        }
        for tensor in layout
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_adapter(path: Path, layout: tuple[TrainableTensor, ...], theta: Theta) -> None:
    """Write the adapter so that a reader sees the old file or the whole new one."""
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(adapter_header(layout))
        file.write(np.ascontiguousarray(theta, "<f4").data)
    partial.replace(path)


def read_adapter(path: Path, layout: tuple[TrainableTensor, ...]) -> Theta:
    """Read theta; raises Refused(MALFORMED) unless header and length are the layout's."""
    header = adapter_header(layout)
    expected = len(header) + 4 * (layout[-1].offset + layout[-1].size)
    with path.open("rb") as file:
        found = path.stat().st_size
        if found != expected or file.read(len(header)) != header:
            raise Refused(
                Reason.MALFORMED,
                f"expected {path.name} with this plan's header and {expected} bytes, found {found}",
            )
        return np.fromfile(file, "<f4").astype(np.float32, copy=False)
