"""A round's sum by a robust rule, in the shape of protection `plain`: agents notice nothing.

What is published as the weighted mean is what the rule makes of the updates. Agents apply it as
any other mean; all get the same bytes, in whatever order the updates came.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import crypto
from coordinator.aggregation import Aggregation
from coordinator.strategies.robust import RULES
from coordinator.strategies.robust.updates import Updates, combined
from crypto import plain
from crypto.masks import Correction
from crypto.wire import Source


class RobustTotal:
    """Checks updates as they come and combines them at the end; see `crypto.Accumulator`.

    `path_of` says where the update of a slot lies, from `add` until the result is read. The rule
    sees an update without its tail (`UpdateContext`), whose weighted mean follows.
    """

    def __init__(
        self,
        context: crypto.UpdateContext,
        aggregation: Aggregation,
        path_of: Callable[[int], Path],
    ) -> None:
        self._context = context
        self._aggregation = aggregation
        self._path_of = path_of
        self._values = context.parameter_count - context.tail_length
        self._roll = plain.Roll(context)

    @property
    def encoded_update_size(self) -> int:
        return plain.encoded_size(self._context)

    @property
    def encoded_sum_size(self) -> int:
        return plain.encoded_size(self._context)

    @property
    def members(self) -> tuple[int, ...]:
        return self._roll.members

    def add(self, member: int, source: Source) -> None:
        self._roll.add(member, source)

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        self._roll.check_summed(correction)
        return self._chunks()

    def _chunks(self) -> Iterator[bytes]:
        members, length = self._roll.members, self._context.parameter_count
        weights = [self._roll.weights[member] for member in members]
        yield plain.sum_prefix(self._context, len(members), sum(weights))
        paths = [self._path_of(member) for member in members]
        updates = Updates(paths, weights, slice(0, self._values))
        for values in RULES[self._aggregation.rule].combine(updates, self._aggregation):
            yield values.astype("<f4").tobytes()
        rest = updates.of(slice(self._values, length))
        for values in combined(rest, updates.shares):
            yield values.astype("<f4").tobytes()
