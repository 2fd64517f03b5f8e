"""How large updates are, as a histogram that only the sum reveals, and the next clip from it.

The clip must be known before anything is encrypted, and be the same for all. Round 0 takes a bound
that needs no data; later rounds take it from the round before. Device half (`bucket`): with m the
largest |value| of an update without its tail (`UpdateContext`) and c the clip,

    e = ⌈log2(m/c)⌉, forced into -10 .. 2,

counted as one in counter 3 + (e + 10): one-hot, so that the sum is the histogram of the members.
Public half (`next_clip`), from the opened histogram, deterministic on every platform: c·2^e for
the largest e that occurs, which is at least every m unless e = 2, and less than twice the largest
unless e = -10. A bucket that is full at 2 lets the clip grow by 4 in each round, until it fits.

What it reveals: to who opens the sum, how many members had which e; to the coordinator, the clip
of the next round, which is public.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidUpdate
from .parameters import COUNTER_EXPONENTS, COUNTERS

LOWEST = -10
HIGHEST = LOWEST + COUNTERS - COUNTER_EXPONENTS - 1  # 2
BUCKETS = HIGHEST - LOWEST + 1

_BLOCK = 1 << 14
_LEAST_CLIP, _LARGEST_CLIP = 1e-20, 1e20  # what `BfvParameters` accepts


def bucket(update: NDArray[np.float32], clip: float) -> int:
    """Return the place in the histogram, 0 .. 12, of an update of finite values."""
    largest = 0.0
    for start in range(0, len(update), _BLOCK):
        block = update[start : start + _BLOCK]
        largest = max(largest, float(block.max()), -float(block.min()))
    if largest == 0.0:
        return 0
    mantissa, exponent = math.frexp(largest / clip)  # largest/clip = mantissa·2^exponent, in [½, 1)
    rounded_up = exponent - (mantissa == 0.5)
    return min(max(rounded_up, LOWEST), HIGHEST) - LOWEST


def next_clip(clip: float, histogram: Sequence[int]) -> float:
    """Return the clip that follows from an opened histogram, a float32 in float64.

    Raises InvalidUpdate for a histogram of nothing.
    """
    occupied = [place for place, count in enumerate(histogram) if count]
    if not occupied or len(histogram) != BUCKETS:
        raise InvalidUpdate("histogram of exponents", f"members in {BUCKETS} buckets", "none")
    grown = math.ldexp(float(np.float32(clip)), occupied[-1] + LOWEST)
    return float(np.float32(min(max(grown, _LEAST_CLIP), _LARGEST_CLIP)))
