"""Which parts of theta a round trains and sends: a strategy sees the parts that are sent, no more.

A part is a run of tensors with one fate. `travelling` lets any strategy work on what is sent as if
it were the whole model: every strategy here moves each value by itself, so its server's vectors
rest in the other parts, as does theta.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from fedloom.adapters import Theta
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.rule import Algorithm, Memory, Places, Sent, ServerState
from fedloom.strategies.tails import Tail

Layout = tuple[TrainableTensor, ...]


class Fate(Enum):
    """What becomes of a tensor in a round."""

    SHARED = "trained and sent"
    PRIVATE = "trained, and kept on the device"
    FROZEN = "not trained"
    MOVED = "no gradient, and moved by the server"
    FIXED = "no gradient, and moved by nobody"


FateOf = Callable[[Role, int], Fate]  # (role, number of rounds applied before)


@dataclass(frozen=True)
class Parts:
    """The parts of theta (P,) in one round; each tuple ascends, and no two slices of one touch.

    `tails` are the ranks that the terms' `rank_penalty` weighs on.
    """

    shared: tuple[slice, ...]
    private: tuple[slice, ...] = ()
    frozen: tuple[slice, ...] = ()
    moved: tuple[slice, ...] = ()  # by the server alone; like `fixed` behind all others
    fixed: tuple[slice, ...] = ()
    tails: tuple[Tail, ...] = ()

    @property
    def resting(self) -> tuple[slice, ...]:
        """What no training moves."""
        return self.frozen + self.moved + self.fixed

    @property
    def applied(self) -> tuple[slice, ...]:
        """What a round's sum moves."""
        return self.shared + self.moved

    @property
    def applied_length(self) -> int:
        """Number of values of a movement in a sum."""
        return sum(part.stop - part.start for part in self.applied)

    def place_of(self, tensor: TrainableTensor) -> slice:
        """Return where a tensor stands in a movement that moves it, an update's or a sum's."""
        place = 0
        for part in self.applied:
            if part.start <= tensor.offset < part.stop:
                place += tensor.offset - part.start
                return slice(place, place + tensor.size)
            place += part.stop - part.start
        raise ValueError(f"expected a tensor that is sent or moved, found {tensor.name}")

    @property
    def shared_length(self) -> int:
        """Number of values that are sent for each of a strategy's vectors."""
        return sum(part.stop - part.start for part in self.shared)


def divide(layout: Layout, fate_of: FateOf, rounds: int) -> Parts:
    """Return the parts in the round after `rounds` applied ones."""
    found: dict[Fate, list[slice]] = {fate: [] for fate in Fate}
    for tensor in layout:
        parts, end = found[fate_of(tensor.role, rounds)], tensor.offset + tensor.size
        if parts and parts[-1].stop == tensor.offset:
            parts[-1] = slice(parts[-1].start, end)
        else:
            parts.append(slice(tensor.offset, end))
    shared, private, frozen, moved, fixed = (tuple(found[fate]) for fate in Fate)
    return Parts(shared, private, frozen, moved, fixed)


def gathered(vector: Vector, parts: Iterable[slice]) -> Vector:
    """Return these parts, one after another."""
    return np.concatenate([vector[part] for part in parts])


def scattered(vector: Vector, parts: Iterable[slice], values: Vector) -> Vector:
    """Return a copy of `vector` that has `values` in these parts."""
    copy, start = vector.copy(), 0
    for part in parts:
        end = start + part.stop - part.start
        copy[part] = values[start:end]
        start = end
    return copy


def unfolded(places: Places, parts: Iterable[slice]) -> Places:
    """Return where places among these parts, one after another, are in the whole vector."""
    found = places.copy()
    start = 0
    for part in parts:
        end = start + part.stop - part.start
        first, last = np.searchsorted(places, (start, end))
        found[first:last] += np.uint32(part.start - start)
        start = end
    return found


def travelling(inner: Algorithm, parts_after: Callable[[int], Parts]) -> Algorithm:
    """Return the algorithm on the parts that are sent; `parts_after(rounds)` says which these are.

    Its `linear` is 0 in the others, and `sent` takes and gives memory of P values.
    """

    def inside(state: ServerState, seen: tuple[slice, ...]) -> ServerState:
        vectors = tuple(gathered(vector, seen) for vector in state.vectors)
        return ServerState(gathered(state.theta, seen), state.rounds, vectors)

    def linear(state: ServerState, memory: Memory) -> Vector | None:
        shared = parts_after(state.rounds).shared
        found = inner.linear(inside(state, shared), tuple(gathered(one, shared) for one in memory))
        zeros = np.zeros(len(state.theta), np.float32)
        return None if found is None else scattered(zeros, shared, found)

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        shared = parts_after(state.rounds).shared
        before = tuple(gathered(one, shared) for one in memory)
        found = inner.sent(inside(state, shared), before, gathered(delta, shared), steps)
        after = zip(memory, found.memory, strict=True)
        return Sent(
            found.values,
            tuple(scattered(old, shared, new) for old, new in after),
            None if found.places is None else unfolded(found.places, shared),
        )

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        applied = parts_after(state.rounds).applied
        moved = inner.apply(inside(state, applied), mean_update, count)
        vectors = zip(state.vectors, moved.vectors, strict=True)
        return ServerState(
            scattered(state.theta, applied, moved.theta),
            moved.rounds,
            tuple(scattered(old, applied, new) for old, new in vectors),
        )

    def joined(state: ServerState, held: Vector, staleness: int) -> Vector:
        shared = parts_after(state.rounds).shared
        return inner.joined(inside(state, shared), held, staleness)

    return Algorithm(apply, inner.init, linear, sent, joined)
