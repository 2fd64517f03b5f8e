"""The updates of one cohort as a rule sees them: a matrix on disk, read by blocks of its columns.

Memory does not grow with the number of updates or their length: a block of K rows has as many
columns as fit `_BLOCK_BYTES`, and rules work in float64 on one block at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation import Aggregation, Rule
from crypto import plain

Block = NDArray[np.float64]  # (K, n): n values of each update, in ascending order of slots
Numbers = NDArray[np.float64]
_BLOCK_BYTES = 16 << 20
_LEAST_COLUMNS = 256


@dataclass(frozen=True)
class Updates:
    """Files of protection `plain`, checked as they came, and their weights, (K,) each.

    `span` are the values that are seen. The files must not change meanwhile.
    """

    paths: Sequence[Path]
    weights: Sequence[int]
    span: slice

    @property
    def count(self) -> int:
        """K."""
        return len(self.paths)

    @property
    def shares(self) -> Numbers:
        """The weights as shares of their sum, (K,)."""
        weights = np.array(self.weights, np.float64)
        shares: Numbers = weights / weights.sum()
        return shares

    def of(self, span: slice) -> "Updates":
        """Return the same updates, of which other values are seen."""
        return replace(self, span=span)

    def blocks(self) -> Iterator[Block]:
        """Read the values once, from the first to the last."""
        columns = max(_LEAST_COLUMNS, _BLOCK_BYTES // (8 * self.count))
        for start in range(self.span.start, self.span.stop, columns):
            width = min(columns, self.span.stop - start)
            block, row = np.empty((self.count, width)), np.empty(width, np.float32)
            for values, path in zip(block, self.paths, strict=True):
                with path.open("rb", buffering=0) as file:
                    plain.read_values(file, start, row)
                values[:] = row
            yield block


Combine = Callable[[Updates, Aggregation], Iterator[Numbers]]  # the result's values, in order


@dataclass(frozen=True)
class RobustRule:
    """A rule as a run file names it, and what can be said of it whatever its numbers."""

    rule: Rule
    name: str
    paper: str
    withstands: str  # how many faulty updates of n, for the table
    weighs: bool  # whether an agent's stated weight counts
    reads: str  # how often the updates are read, for the table
    combine: Combine


def combined(updates: Updates, shares: Numbers) -> Iterator[Numbers]:
    """Yield sum_k share_k x_k; `shares` is (K,)."""
    for block in updates.blocks():
        yield shares @ block
