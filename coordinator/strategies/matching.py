"""Matching of neurons: BBP-MAP of PFNM (Yurochkin et al., arXiv:1905.12022), as FedMA uses it.

v_jl is what neuron l of device j has learnt (its row of the layer's weights, with its bias), p_j
the device's share. Given all other devices' matches, device j's cost of taking place i is minus the
posterior's gain (PFNM's cost, with prior mean 0 and s_j^2 = s^2 / p_j):

    S_i = sum_(k != j) p_k v_k at i          q = sum_(k != j) p_k          r = s^2 / s_0^2
    C_il = - |S_i + p_j v_jl|^2 / (r + q + p_j) + |S_i|^2 / (r + q)

where the width is fixed and every neuron takes one place: all places are equally popular and there
are no new ones, so that these terms of PFNM are the same everywhere. What depends on i or on l
alone is the same for every assignment, too, and there remains

    C_il ~ - S_i . v_jl

whatever s and s_0 are: SciPy's `linear_sum_assignment` maximises the sum of these products.

Devices are taken in turn, those of the largest share first, each against those before it; then
each again against all others, until nothing changes (PFNM, Algorithm 1, takes them in random
order). The sum of |S_i|^2 over all devices never falls, so that this ends; after SWEEPS at most.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import crypto
from coordinator.strategies.robust.updates import Updates, combined
from crypto import plain
from crypto.masks import Correction
from crypto.wire import Source
from fedloom.strategies.fedma import Layer

SWEEPS = 20
Values = NDArray[np.float64]
Places = NDArray[np.intp]


def match(neurons: Values, shares: Values) -> Places:
    """Return which neuron of each device is at each place, (K, L) of (K, L, values).

    The device of the largest share, the first of them, has its neurons where they are.
    """
    count, width = neurons.shape[:2]
    places = np.tile(np.arange(width), (count, 1))
    order = np.argsort(-shares, kind="stable")
    first, *others = order
    total = shares[first] * neurons[first]
    for device in others:
        places[device] = _assigned(total, neurons[device])
        total += shares[device] * neurons[device, places[device]]
    for _ in range(SWEEPS):
        changed = False
        for device in others:
            own = shares[device] * neurons[device]
            rest = total - own[places[device]]
            found = _assigned(rest, neurons[device])
            if _gain(rest, own, found) > _gain(rest, own, places[device]) * (1 + 1e-12):
                places[device], changed = found, True
            total = rest + own[places[device]]
        if not changed:
            break
    return places


def _assigned(total: Values, neurons: Values) -> Places:
    """Return which neuron goes where: the places' sums are (L, values)."""
    from scipy.optimize import linear_sum_assignment  # 0.2 s: only runs that match pay for it

    _, columns = linear_sum_assignment(total @ neurons.T, maximize=True)
    return np.asarray(columns, np.intp)


def _gain(rest: Values, own: Values, places: Places) -> float:
    return float(np.square(rest + own[places]).sum())


@dataclass(frozen=True)
class _Devices:
    """The updates, and where the first value of the first layer lies in theta."""

    updates: Updates
    start: int

    def read(self, start: int, size: int) -> Values:
        """Return values of all devices, (K, size); `start` is a place in theta."""
        place = start - self.start
        return np.concatenate(list(self.updates.of(slice(place, place + size)).blocks()), axis=1)


def class_shares(counts: Values, shares: Values) -> Values:
    """Return p_jk of the counts n_jk, (K, C): `shares` (K,) for a class that nobody has."""
    counts = np.maximum(counts, 0)
    whole = counts.sum(axis=0)
    found: Values = np.where(whole > 0, counts / np.where(whole > 0, whole, 1), shares[:, None])
    return found


def matched(updates: Updates, layers: Sequence[Layer], counts: Values) -> Iterator[Values]:
    """Yield the global layers' values, first to last; one layer of all devices is in memory.

    `counts` (K, C) are the rows of each label.
    """
    devices = _Devices(updates, layers[0].start)
    shares, count = updates.shares, updates.count
    places: Places | None = None  # of the layer before; None: its order is every device's
    for layer in layers:
        shape = (count, *layer.weight.shape)
        weights = devices.read(layer.weight.offset, layer.weight.size).reshape(shape)
        biases = np.zeros((count, shape[1], 0))
        if layer.bias is not None:
            biases = devices.read(layer.bias.offset, layer.bias.size)[:, :, None]
        if places is not None:
            weights = _inputs_moved(weights, places, layer.spread)
        if layer is not layers[-1]:
            rows = weights.reshape(count, shape[1], -1)
            places = match(np.concatenate([rows, biases], axis=2), shares)
            weights = np.stack([w[p] for w, p in zip(weights, places, strict=True)])
            biases = np.stack([b[p] for b, p in zip(biases, places, strict=True)])
        by_row = np.tile(shares[:, None], shape[1])  # (K, outputs)
        if layer is layers[-1]:
            by_row = class_shares(counts, shares)
        yield np.einsum("ko,ko...->o...", by_row, weights).reshape(-1)
        yield np.einsum("ko,kov->ov", by_row, biases).reshape(-1)


def _inputs_moved(weights: Values, places: Places, spread: int) -> Values:
    """Put each device's inputs where the neurons that they come from are now."""
    moved = np.empty_like(weights)
    for device, order in enumerate(places):
        columns = (order[:, None] * spread + np.arange(spread)).reshape(-1)
        moved[device] = weights[device][:, columns]
    return moved


class MatchedTotal:
    """A round's weights, matched at the end; see `crypto.Accumulator` and `RobustTotal`.

    `layers` are those that the updates hold, in order (`fedloom.strategies.fedma.open_layers`).
    """

    def __init__(
        self,
        context: crypto.UpdateContext,
        layers: Sequence[Layer],
        path_of: Callable[[int], Path],
    ) -> None:
        self._context = context
        self._layers = tuple(layers)
        self._path_of = path_of
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
        values = length - self._context.tail_length
        outputs = self._layers[-1].weight.shape[0]
        updates = Updates([self._path_of(member) for member in members], weights, slice(0, values))
        labels = updates.of(slice(values - outputs, values))
        counts = np.concatenate(list(labels.blocks()), axis=1)
        for layer in matched(updates, self._layers, counts):
            yield layer.astype("<f4").tobytes()
        yield bytes(4 * outputs)  # nobody needs to know how many rows are of which label
        for rest in combined(updates.of(slice(values, length)), updates.shares):
            yield rest.astype("<f4").tobytes()
