"""A round's sum by a rule that needs every device's factors, in the shape of protection `plain`.

What such a rule makes of the updates (`fedloom.strategies.products`) stands where the weighted mean
would, so agents apply it as any other. The updates are read from the spool, one device's factors of
one matrix after another: memory does not grow with their number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import crypto
from coordinator.faults import StorageFault
from coordinator.model_state import ModelState
from crypto import plain
from crypto.masks import Correction
from crypto.wire import Source
from fedloom.errors import Refused
from fedloom.plans import Plan
from fedloom.strategies import moved_length
from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.factors import Matrix
from fedloom.strategies.portions import FACTOR_RULES, parts_of
from fedloom.strategies.products import FactorServer, Updates
from fedloom.terms import LocalTraining


@dataclass(frozen=True)
class FactorRound:
    """What decides a round's sum besides its updates: the model before it, if nothing else."""

    terms: LocalTraining
    plan: Plan
    rounds: int  # that were applied before
    before: Callable[[], ModelState]

    def server(self) -> FactorServer:
        """Return the server's half of the rule; raises StorageFault where a sum is gone."""
        try:
            theta = self.before().theta
        except Refused as refused:
            raise StorageFault("published sums", refused.subject) from refused
        return FactorServer(
            FACTOR_RULES[self.terms.lora],
            self.plan.layout,
            parts_of(self.terms, self.plan.layout, self.rounds),
            theta,
            self.plan.origin.lora_scale,
            (self.terms.seed, self.rounds),
        )


class FactoredTotal:
    """Checks updates as they come and combines them at the end; see `crypto.Accumulator`.

    `path_of` says where the update of a slot lies, from `add` until the result is read. An update's
    tail (`UpdateContext`) is no part of the rule: its weighted mean follows.
    """

    def __init__(
        self, context: crypto.UpdateContext, round_: FactorRound, path_of: Callable[[int], Path]
    ) -> None:
        self._context = context
        self._round = round_
        self._path_of = path_of
        self._roll = plain.Roll(context)

    @property
    def encoded_update_size(self) -> int:
        return plain.encoded_size(self._context)

    @property
    def encoded_sum_size(self) -> int:
        round_ = self._round
        moved = moved_length(round_.terms, round_.plan.layout, round_.rounds)
        return plain.encoded_size(self._context) + 4 * moved

    @property
    def members(self) -> tuple[int, ...]:
        return self._roll.members

    def add(self, member: int, source: Source) -> None:
        self._roll.add(member, source)

    def result(self, correction: Correction | None = None) -> Iterator[bytes]:
        self._roll.check_summed(correction)
        return self._chunks()

    def _chunks(self) -> Iterator[bytes]:
        members, context = self._roll.members, self._context
        weights = [self._roll.weights[member] for member in members]
        paths = [self._path_of(member) for member in members]
        shares = np.array(weights, np.float64) / sum(weights)
        updates = Updates(shares, lambda index, span: _values(paths[index], span))
        published = _checked(self._round.server(), updates)
        length = context.parameter_count - context.tail_length
        tail = updates.mean(slice(length, context.parameter_count)).astype(np.float32)
        values = np.concatenate([published, tail])
        summed = replace(context, parameter_count=len(values))
        yield from plain.encoded_sum(summed, len(members), sum(weights), values)


def _checked(server: FactorServer, updates: Updates) -> Vector:
    """Refuse what devices would: products of finite factors may be beyond float32."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            published = server.published(updates)
    except np.linalg.LinAlgError as error:
        raise crypto.NotFinite("mean of products", "one that has an SVD", "none") from error
    if not np.isfinite(published).all():
        raise crypto.NotFinite("new factors", "finite values", "NaN or infinity")
    return published


def _values(path: Path, span: slice) -> Matrix:
    values = np.empty(span.stop - span.start, np.float32)
    with path.open("rb", buffering=0) as file:
        plain.read_values(file, span.start, values)
    return values.astype(np.float64)
