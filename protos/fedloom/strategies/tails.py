"""The last ranks of an adapter's products B A: where they lie in theta, how large they are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies.arithmetic import Vector


@dataclass(frozen=True)
class Pair:
    """The factors of one product: A (rank, in) from `a_offset`, B (out, rank) from `b_offset`."""

    rank: int
    inputs: int
    outputs: int
    a_offset: int
    b_offset: int

    def a(self, theta: Vector) -> Vector:
        """Return A (rank, in), a view of theta (P,)."""
        return theta[self.a_offset :][: self.rank * self.inputs].reshape(self.rank, self.inputs)

    def b(self, theta: Vector) -> Vector:
        """Return B (out, rank), a view of theta (P,)."""
        return theta[self.b_offset :][: self.outputs * self.rank].reshape(self.outputs, self.rank)


@dataclass(frozen=True)
class Tail:
    """Ranks `first` to `last` - 1 of a product."""

    pair: Pair
    first: int
    last: int

    def a(self, theta: Vector) -> Vector:
        """Return these rows of A (ranks, in), a view."""
        return self.pair.a(theta)[self.first : self.last]

    def b(self, theta: Vector) -> Vector:
        """Return these columns of B (out, ranks), a view."""
        return self.pair.b(theta)[:, self.first : self.last]


def pairs_of(layout: tuple[TrainableTensor, ...]) -> tuple[Pair, ...]:
    """Return the products of a layout, whose factors stand in it in equal order.

    Raises Refused(PLAN_UNSUPPORTED) where an A has no B or another rank.
    """
    factors = [
        [tensor for tensor in layout if tensor.role is role] for role in (Role.LORA_A, Role.LORA_B)
    ]
    fit = len(factors[0]) == len(factors[1]) and all(
        len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
        for a, b in zip(*factors, strict=False)
    )
    if not fit:
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            "expected a layout whose LORA_A (rank, in) each have a LORA_B (out, rank), found "
            f"{len(factors[0])} and {len(factors[1])}, or other ranks",
        )
    return tuple(
        Pair(a.shape[0], a.shape[1], b.shape[0], a.offset, b.offset)
        for a, b in zip(*factors, strict=True)
    )


def norm(matrix: Vector) -> float:
    """Return the Frobenius norm, added up in float64."""
    return math.sqrt(float(np.square(matrix, dtype=np.float64).sum()))


def size(tails: Iterable[Tail], theta: Theta) -> float:
    """Return sum |B| |A| over these ranks of all products."""
    return sum(norm(tail.b(theta)) * norm(tail.a(theta)) for tail in tails)


def add_penalty(gradient: Vector, theta: Theta, tails: Iterable[Tail], factor: float) -> None:
    """Add the gradient of factor * `size` to `gradient` (P,), in place.

    d |B| |A| / dB = |A| B / |B|, and 0 where B is: the norm has no other gradient there.
    """
    for tail in tails:
        a, b = norm(tail.a(theta)), norm(tail.b(theta))
        if a and b:
            tail.b(gradient)[:] += np.float32(factor * a / b) * tail.b(theta)
            tail.a(gradient)[:] += np.float32(factor * b / a) * tail.a(theta)
