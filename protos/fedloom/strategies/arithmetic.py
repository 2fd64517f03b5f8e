"""Float32 arithmetic on vectors that ends with equal bits on every machine: + - * / and sqrt.

IEEE 754 fixes each of these operations, and numpy fuses none. What machines differ in is numbers
below the smallest normal one, 2^-126: some processors, and any that a library has told to, take
them for zero. So that all end alike, such numbers are zero here, with sign +, in every operand and
result; and products and quotients below 2^-125 are, since it depends on the processor whether one
that rounds up to 2^-126 counts as below it. A sum below 2^-125 is exact, and a root of a normal
number is normal.

Vectors are handled in blocks that stay in the cache. Operands are flushed before the first
operation on them; these functions keep them so.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
_BLOCK = 1 << 14  # values handled at once: 64 KiB of float32 stays in the cache
_EXPONENT = np.uint32(0x7F800000)  # bits of the exponent, biased by 127


def blocks(length: int) -> Iterator[slice]:
    """Yield the blocks of a vector."""
    for start in range(0, length, _BLOCK):
        yield slice(start, min(start + _BLOCK, length))


def flush(values: Vector, least_exponent: int = 1) -> None:
    """Set numbers below 2^(least_exponent - 127) to +0, in place; no mode changes integers."""
    bits = values.view(np.uint32)
    bits *= (bits & _EXPONENT) >= np.uint32(least_exponent << 23)


def flushed(values: Vector) -> Vector:
    """Return a flushed copy."""
    copy = values.copy()
    flush(copy)
    return copy


def constant(value: float) -> Vector:
    """Return a number computed in float64 as float32, (1,)."""
    rounded = np.array([value], np.float32)
    flush(rounded, least_exponent=2)
    return rounded


def add(values: Vector, others: Vector) -> None:
    """values += others."""
    values += others
    flush(values)


def subtract(values: Vector, others: Vector) -> None:
    """values -= others."""
    values -= others
    flush(values)


def multiply(values: Vector, factors: Vector) -> None:
    """values *= factors."""
    values *= factors
    flush(values, least_exponent=2)


def divide(values: Vector, divisors: Vector) -> None:
    """values /= divisors, none of which is 0."""
    values /= divisors
    flush(values, least_exponent=2)
