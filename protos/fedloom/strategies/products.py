"""What the server makes of every device's factors, in the place of the mean of their updates.

    B', A' <- the rule's new pair of (p_k, B_k, A_k)
    sum    <- [mean of the other parts' movements, B' - B, A' - A; s (sum_k p_k B_k A_k - B' A')]

The last part, the residual's movement, is there for rules that have one. Devices add all of it to
theta, value by value, and so end with equal bits; this arithmetic is the server's own, in float64.
B' A' is the product of what they end with: what float32 rounds is in the residual as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedloom.adapters import Theta
from fedloom.plans import TrainableTensor
from fedloom.strategies.arithmetic import Vector
from fedloom.strategies.factors import FactorRule, Matrix, Pair, TrainedPairs
from fedloom.strategies.parts import Layout, Parts
from fedloom.strategies.targets import Target, targets_of

_BLOCK = 1 << 18  # values of each update in memory at once


@dataclass(frozen=True)
class Updates:
    """A cohort's updates: `shares` (K,) are p_k; `read(k, span)` gives these of device k's values.

    A span is one of an update's U values; what is read is float64 and the reader's own.
    """

    shares: Matrix
    read: Callable[[int, slice], Matrix]

    def mean(self, span: slice) -> Matrix:
        """Return sum_k p_k x_k."""
        total = np.zeros(span.stop - span.start)
        for index, share in enumerate(self.shares):
            total += share * self.read(index, span)
        return total


@dataclass(frozen=True)
class FactorServer:
    """The server's half of a rule that needs every device's factors, in one round.

    `theta` (P,) is the model before the round, `scale` is s, `seed` the run's and the round's.
    """

    rule: FactorRule
    layout: Layout
    parts: Parts
    theta: Theta
    scale: float
    seed: tuple[int, ...]

    def published(self, updates: Updates) -> Vector:
        """Return what stands in the sum: (U,) movements, then (R,) those of the residual."""
        length = self.parts.shared_length
        found = np.empty(self.parts.applied_length, np.float32)
        for start in range(0, length, _BLOCK):  # that of factors is overwritten
            block = slice(start, min(start + _BLOCK, length))
            found[block] = updates.mean(block)
        for index, target in enumerate(targets_of(self.layout)):
            self._put(found, target, updates, index)
        return found

    def _put(self, found: Vector, target: Target, updates: Updates, index: int) -> None:
        factors = [(tensor, self.parts.place_of(tensor)) for tensor in (target.b, target.a)]

        def read(device: int) -> Pair:
            b, a = (self._before(t) + updates.read(device, s).reshape(t.shape) for t, s in factors)
            return b, a

        trained = TrainedPairs(updates.shares, read, (*self.seed, index))
        if self.rule.new_pair is None:
            raise AssertionError("expected a rule that needs every device's factors")
        for (tensor, place), new in zip(factors, self.rule.new_pair(trained), strict=True):
            found[place] = (new - self._before(tensor)).ravel()
        if not self.rule.has_residual or target.residual is None:
            return
        b, a = (self._after(tensor, found[place]) for tensor, place in factors)
        lacking = trained.mean_product()
        lacking -= b @ a
        lacking *= self.scale
        found[self.parts.place_of(target.residual)] = lacking.ravel()

    def _before(self, tensor: TrainableTensor) -> Matrix:
        values = self.theta[tensor.offset : tensor.offset + tensor.size]
        return values.astype(np.float64).reshape(tensor.shape)

    def _after(self, tensor: TrainableTensor, movement: Vector) -> Matrix:
        """Return what the devices will have."""
        values = self.theta[tensor.offset : tensor.offset + tensor.size] + movement
        return values.astype(np.float64).reshape(tensor.shape)
