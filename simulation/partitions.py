"""How one data set becomes many clients': alike, by skewed labels, or by the values of a column.

iid             rows in random order, cut into parts whose sizes differ by one at most
dirichlet:A     each label's rows by shares drawn from Dir(A): Hsu, Qi, Brown,
                arXiv:1909.06335v1, section 3.1; A is the concentration, small is skewed.
                Deviation: shares are drawn for each label, not for each client, so that every
                row is used once; who ends with none is given one of the largest part's.
by:COLUMN       a client for each value of a column, in order of their first appearance
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.batches import Indices
from fedloom.errors import ConfigError

_EXPECTED = "expected iid, dirichlet:NUMBER or by:COLUMN"


@dataclass(frozen=True)
class Partition:
    """What a person typed, read."""

    kind: str
    concentration: float = 0.0
    column: str = ""


def read_partition(text: str) -> Partition:
    """Parse `iid`, `dirichlet:0.5` or `by:COLUMN`; raises ConfigError."""
    kind, _, value = text.partition(":")
    if kind == "iid" and not value:
        return Partition("iid")
    if kind == "by" and value:
        return Partition("by", column=value)
    try:
        concentration = float(value) if kind == "dirichlet" else 0.0
    except ValueError:
        concentration = 0.0
    if not 0 < concentration < float("inf"):
        raise ConfigError("partition", f"{_EXPECTED}, found {text!r}")
    return Partition("dirichlet", concentration)


def iid(count: int, clients: int, seed: int) -> list[Indices]:
    """Cut `count` rows in random order into equal parts."""
    _require_rows(count, clients)
    order = _generator(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(labels: NDArray[Any], clients: int, concentration: float, seed: int) -> list[Indices]:
    """Share out each label's rows; `labels` (N,) are classes."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ConfigError("partition", "expected one class for each row with dirichlet, found none")
    _require_rows(len(labels), clients)
    generator = _generator(seed)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(clients, concentration))
        bounds = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        owner[rows] = np.repeat(np.arange(clients), np.diff([0, *bounds.tolist(), len(rows)]))
    _give_to_the_empty(owner, clients)
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=clients)
    return np.split(order, np.cumsum(counts)[:-1])


def _give_to_the_empty(owner: NDArray[np.int64], clients: int) -> None:
    counts = np.bincount(owner, minlength=clients)
    for empty in np.flatnonzero(counts == 0):
        largest = int(np.argmax(counts))
        owner[np.flatnonzero(owner == largest)[-1]] = empty
        counts[largest] -= 1
        counts[empty] = 1


def by_value(values: Sequence[object]) -> list[Indices]:
    """Return the rows of each value."""
    rows: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        rows.setdefault(str(value), []).append(index)
    return [np.array(part, np.int64) for part in rows.values()]


def _require_rows(count: int, clients: int) -> None:
    if not 1 <= clients <= count:
        raise ConfigError(
            "agents", f"expected 1..{count}, a row for each at least, found {clients}"
        )


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, 0x70617274))))
