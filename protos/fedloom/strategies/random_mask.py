"""Random masks: all agents send the values at the same places, drawn anew in every round.

Konecny, McMahan, Yu, Richtarik, Suresh, Bacon, arXiv:1610.05492v2, section 2 ("random mask") and
3 ("subsampling"), with two deviations: the mask is one for all clients, not one for each, since
sums under masks or encryption add value to value; and it has one place in each of k strata of equal
length (to 1), instead of k among all, so that it is drawn in one pass at no memory beyond itself.
Every place is drawn with probability 1 / (length of its stratum), as with k of n.

A mask follows from public numbers alone, hence tells nothing of data. To the coordinator and the
protections an update is k values; theta and the server's vectors rest at the other places. Resting
and not moving by 0: a place that was not asked has told nothing. With zeros, a server's momentum
would go on moving it by what it told many rounds ago, and a second moment that decays meanwhile
would make its next step too long.

As it is, the step is a descent on k coordinates (the paper's structured update). `unbiased`
multiplies the mean at place j by its stratum's length (the sketched update): its expectation over
masks is the mean of whole movements, at a variance of (length - 1) times their squares, which
diverges where a round moves by more than about 2 / length of the way to its optimum. What is
scaled is the opened mean, not the update: the clip stays that of a movement.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.compression import chosen_count
from fedloom.strategies.arithmetic import Vector, flush, multiply
from fedloom.strategies.error_feedback import added
from fedloom.strategies.rule import Algorithm, Memory, Places, Sent, ServerState
from fedloom.terms import LocalTraining

_LABEL = b"fedloom v1 random mask\0"
_SEED = struct.Struct("<QQ")
_BLOCK = 1 << 14  # strata drawn at once: 128 KiB of keystream stays in the cache


@dataclass(frozen=True)
class RandomMask:
    """Which values travel in the round after `rounds` applied ones; control.proto has the bytes."""

    seed: int  # u64
    rounds: int
    length: int  # U, values of which a mask is drawn
    count: int  # k, 1 .. U

    @classmethod
    def of(cls, terms: LocalTraining, rounds: int, length: int) -> "RandomMask":
        """Return the mask of a round."""
        return cls(terms.seed, rounds, length, chosen_count(terms.compression_share, length))

    def places(self) -> Places:
        """Return the places, (k,) u32, ascending."""
        places = np.empty(self.count, np.uint32)
        for block, starts, widths, words in self._strata():
            places[block] = starts + (words % widths)
        return places

    def widths(self) -> NDArray[np.float32]:
        """Return the lengths of the strata, (k,): one over the probability of their places."""
        widths = np.empty(self.count, np.float32)
        for start in range(0, self.count, _BLOCK):
            block = slice(start, min(start + _BLOCK, self.count))
            widths[block] = np.diff(self._bounds(block))
        return widths

    def _strata(
        self,
    ) -> Iterator[tuple[slice, NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]]:
        key = hashlib.sha256(_LABEL + _SEED.pack(self.seed, self.rounds)).digest()
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        for start in range(0, self.count, _BLOCK):
            block = slice(start, min(start + _BLOCK, self.count))
            bounds = self._bounds(block)
            words = np.frombuffer(stream.update(bytes(8 * (block.stop - start))), "<u8")
            yield block, bounds[:-1], np.diff(bounds), words

    def _bounds(self, block: slice) -> NDArray[np.uint64]:
        """Return b_j for j from the block's start to its stop, inclusive; U k < 2^62."""
        numbers = np.arange(block.start, block.stop + 1, dtype=np.uint64)
        return numbers * np.uint64(self.length) // np.uint64(self.count)


def masked(inner: Algorithm, terms: LocalTraining) -> Algorithm:
    """Return the algorithm of a movement alone, of which the values in a mask are sent."""

    def mask_of(state: ServerState) -> RandomMask:
        return RandomMask.of(terms, state.rounds, len(state.theta))

    def sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
        del steps
        places = mask_of(state).places()
        waiting = added(delta, memory)
        values: Vector = waiting[places]
        return Sent(values, (waiting,), places) if memory else Sent(values)

    def apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
        mask = mask_of(state)
        places = mask.places()
        if terms.unbiased:
            flush(mean_update)
            multiply(mean_update, mask.widths())
        vectors = tuple(vector[places] for vector in state.vectors)
        inside = ServerState(state.theta[places], state.rounds, vectors)
        moved = inner.apply(inside, mean_update, count)
        pairs = zip(state.vectors, moved.vectors, strict=True)
        return ServerState(
            _placed(state.theta, places, moved.theta),
            moved.rounds,
            tuple(_placed(old, places, new) for old, new in pairs),
        )

    return Algorithm(apply, inner.init, inner.linear, sent)


def _placed(vector: Vector, places: Places, values: Vector) -> Vector:
    """Return a copy of `vector` that has `values` at these places."""
    copy = vector.copy()
    copy[places] = values
    return copy
