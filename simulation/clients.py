"""Virtual clients: names, and the rows that each of them holds. Nobody copies the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.batches import Examples, Feeds, Indices, LabelledArrays
from fedloom.errors import ConfigError

INPUT = "x"  # name of a torch module's single input


@dataclass(frozen=True)
class Rows:
    """Some rows of a data set, as a data set: see `edge_agent.batches.Examples`."""

    whole: Examples
    held: Indices  # (n,) positions in the whole

    def __len__(self) -> int:
        return len(self.held)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """See Examples."""
        return self.whole.lengths[self.held]

    @property
    def sha256(self) -> bytes:
        """See Examples; a simulated client keeps no checkpoint that would be bound to its rows."""
        return self.whole.sha256

    def inputs(self, rows: Indices) -> Feeds:
        """See Examples."""
        return self.whole.inputs(self.held[rows])

    def labels(self, rows: Indices) -> NDArray[Any]:
        """See Examples."""
        return self.whole.labels(self.held[rows])


Clients = Mapping[str, Examples]  # by name; names sort as the clients were made


def names(count: int) -> list[str]:
    """Return the names of so many clients, in ascending order."""
    width = max(6, len(str(count - 1)))
    return [f"client-{number:0{width}}" for number in range(count)]


def partitioned(whole: Examples, parts: Sequence[Indices]) -> dict[str, Examples]:
    """Return one client for each part of a data set."""
    return {name: Rows(whole, part) for name, part in zip(names(len(parts)), parts, strict=True)}


def as_examples(data: object) -> Examples:
    """Return what a person calls data as examples of one input.

    (inputs, labels) as arrays or tensors, a map-style torch Dataset of such pairs, or Examples.
    Floats become float32, integers int64.
    """
    if hasattr(data, "inputs") and hasattr(data, "labels") and hasattr(data, "lengths"):
        return data  # type: ignore[return-value]  # what Examples asks for is there
    tensors = getattr(data, "tensors", None)  # of a TensorDataset
    pair = data if tensors is None else tensors
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        pair = _stacked(pair)
    inputs, labels = (_array(part) for part in pair)
    if not len(inputs) or len(inputs) != len(labels):
        raise ConfigError(
            "data", f"expected as many inputs as labels, found {len(inputs)} and {len(labels)}"
        )
    return LabelledArrays({INPUT: inputs}, labels)


def _stacked(data: Any) -> tuple[list[Any], list[Any]]:
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise ConfigError(
            "data",
            "expected (inputs, labels), a torch Dataset with a length, or Examples, "
            f"found {type(data).__name__}",
        )
    pairs = [data[index] for index in range(len(data))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _array(part: Any) -> NDArray[Any]:
    if isinstance(part, list):
        part = [np.asarray(value) for value in part]
    values = np.asarray(part)
    if values.dtype.kind == "f":
        return np.ascontiguousarray(values, np.float32)
    if values.dtype.kind in "biu":
        return np.ascontiguousarray(values, np.int64)
    raise ConfigError("data", f"expected numbers, found values of type {values.dtype}")
