"""`base.safetensors`: the frozen weights that all graphs of a plan share, as float32 or integers.

Format: huggingface/safetensors README, "Format". ONNX finds a tensor by its offset in the file.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from coordinator.plans.model import AdaptedModel
from fedloom.plans import BASE_FILE

_ALIGNMENT = 64  # bytes; the first tensor is aligned for memory mapping
_LENGTH = struct.Struct("<Q")  # of the header's text
_DTYPES: dict[int, str] = {TensorProto.FLOAT: "F32", TensorProto.INT8: "I8", TensorProto.INT4: "U8"}
_BITS: dict[int, int] = {TensorProto.FLOAT: 32, TensorProto.INT8: 8, TensorProto.INT4: 4}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file; `element` is ONNX's type, `start` counts bytes after the header."""

    name: str
    element: int
    shape: tuple[int, ...]  # 4-bit values count one by one
    start: int

    @property
    def size_bytes(self) -> int:
        """Length in the file."""
        return math.prod(self.shape) * _BITS[self.element] // 8

    @property
    def entry(self) -> dict[str, object]:
        """What the file's header says of it: safetensors has no 4-bit type, but pairs in bytes."""
        shape = list(self.shape)
        if self.element == TensorProto.INT4:
            shape[-1] //= 2
        offsets = [self.start, self.start + self.size_bytes]
        return {"dtype": _DTYPES[self.element], "shape": shape, "data_offsets": offsets}


@dataclass(frozen=True)
class Base:
    """The whole file: its tensors in order, and the bytes of each."""

    tensors: tuple[StoredTensor, ...]
    values: tuple[NDArray[Any], ...]

    @property
    def header(self) -> bytes:
        """Everything that stands before the first tensor."""
        entries = {tensor.name: tensor.entry for tensor in self.tensors}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
        return _LENGTH.pack(len(text)) + text

    def write(self, folder: Path) -> None:
        """Write `base.safetensors`."""
        with (folder / BASE_FILE).open("wb") as file:
            file.write(self.header)
            for values in self.values:
                file.write(np.ascontiguousarray(values).data)


def lay_out(tensors: list[tuple[str, int, tuple[int, ...], NDArray[Any]]]) -> Base:
    """Lay tensors out one after the other: (name, ONNX's type, shape, values)."""
    layout: list[StoredTensor] = []
    start = 0
    for name, element, shape, _ in tensors:
        layout.append(StoredTensor(name, element, shape, start))
        start += layout[-1].size_bytes
    return Base(tuple(layout), tuple(values for *_, values in tensors))


def float_base(adapted: AdaptedModel, used: set[str]) -> Base:
    """Return the weights that some graph uses, in the model's order, as float32."""
    weights = zip(adapted.frozen_names, adapted.frozen_tensors(), strict=True)
    return lay_out(
        [
            (name, TensorProto.FLOAT, tuple(weight.shape), weight.numpy().astype("<f4", copy=False))
            for name, weight in weights
            if name in used
        ]
    )
