"""From float32 values to the coefficients of a plaintext, and from the sum of these to the mean.

Device half (`pack`). With c the clip, h the half levels, w the weight and w_max the weight cap,
a value x becomes the integer

    y = ⌊z⌋ + (u < z - ⌊z⌋),   z = clip(x, -c, c) · (h/c) · (w/w_max),   u uniform in [0, 1)

so that E[y] = z: stochastic rounding, unbiased (Alistarh et al., arXiv 1610.02132, §3.1). All in
float32: z differs from the real product by what float32 itself does to x, and u has 24 bits.
Coefficients carry m = y + h in 0 .. 2h; value j·coefficients + i of the update is field j (bits
j·F to (j+1)·F - 1) of coefficient i. A field without a value is 0.

Opening half (`unpack`). A field of the sum of K updates is M = Σy + K·h, and

    mean = Σ(w·x) / Σw  ≈  (M - K·h) · (c · w_max) / (h · Σw)

computed in float64 in exactly this order and rounded to float32 once: every agent, on every
platform, gets the same bits from the same sum. Σy is exact in float64, being below 2^53.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidUpdate, NotFinite, OpeningFailed, WeightOutOfRange
from .parameters import BfvParameters, UpdateContext

BLOCK = 1 << 14  # values handled at once: 64 KiB of float32 stays in the cache

Update = NDArray[np.float32]
Words = NDArray[np.uint64]
Chunks = Iterator[tuple[int, Words]]  # (chunk, (4096·n,) u64 coefficients below 2^T)


def check_update(update: Update, weight: int, context: UpdateContext) -> None:
    """Refuse what cannot be averaged, before the first byte of it is encoded."""
    shape = (context.parameter_count,)
    if update.dtype != np.float32 or update.shape != shape:
        raise InvalidUpdate("update", f"float32 {shape}", f"{update.dtype} {update.shape}")
    check_weight(weight, context)
    for start in range(0, len(update), BLOCK):
        check_finite(update[start : start + BLOCK], start)


def check_weight(weight: int, context: UpdateContext) -> None:
    """Refuse a weight outside 1 .. weight_cap."""
    if not 1 <= weight <= context.weight_cap:
        raise WeightOutOfRange("weight", f"1 .. {context.weight_cap}", weight)


def check_finite(block: Update, start: int) -> None:
    """Refuse NaN and infinities; `start` is the block's place in the update."""
    finite = np.isfinite(block)
    if not finite.all():
        place = start + int(np.argmin(finite))
        raise NotFinite(f"value {place} of the update", "a finite number", "NaN or infinity")


def pack(
    parameters: BfvParameters, update: Update, weight: int, chunk: slice, rng: np.random.Generator
) -> tuple[Words, int]:
    """Quantise and pack the coefficients of one chunk; return them and how many values saturated.

    `chunk` is a range of coefficients. Returns (coefficients,) u64 below 2^(v·F).
    """
    packed = np.zeros(chunk.stop - chunk.start, np.uint64)
    saturated = 0
    for field in range(parameters.values_per_coefficient):
        shift = np.uint64(field * parameters.field_bits)
        values = _field(parameters, update, chunk, field)
        for start in range(0, len(values), BLOCK):
            block = values[start : start + BLOCK]
            levels, clipped = quantise(parameters, block, weight, rng)
            packed[start : start + len(block)] |= levels.astype(np.uint64) << shift
            saturated += clipped
    return packed, saturated


def quantise(
    parameters: BfvParameters, block: Update, weight: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint32], int]:
    """Return y + h for each value, in 0 .. 2h, and how many of them lay beyond the clip."""
    h, cap = parameters.half_levels, parameters.context.weight_cap
    scale = np.float32(h / parameters.clip * (weight / cap))
    limit = np.float32(h * (weight / cap))  # what rounding of x·scale could exceed
    clip = np.float32(parameters.clip)
    saturated = int(np.count_nonzero(np.abs(block) > clip))
    z = np.clip(block, -clip, clip)  # (n,) float32, in units of a level after the next line
    z *= scale
    np.clip(z, -limit, limit, out=z)
    floor = np.floor(z)
    z -= floor
    floor += rng.random(len(block), dtype=np.float32) < z
    floor += np.float32(h)  # 0 .. 2h < 2^24: exact
    return floor.astype(np.uint32), saturated


def unpack(
    parameters: BfvParameters,
    summed: Words,
    chunk: slice,
    count: int,
    total_weight: int,
    mean: Update,
) -> None:
    """Write the mean of one chunk of values to its places in `mean`.

    Raises OpeningFailed where the coefficients are not a sum of `count` packed updates.
    """
    h, bits = parameters.half_levels, parameters.field_bits
    scale = (parameters.clip * parameters.context.weight_cap) / (h * total_weight)
    fields = parameters.values_per_coefficient
    _expect_at_most(summed >> np.uint64(fields * bits), 0, "bits above the fields")
    for field in range(fields):
        levels = (summed >> np.uint64(field * bits)) & np.uint64((1 << bits) - 1)
        values = _field(parameters, mean, chunk, field)
        _expect_at_most(levels, 2 * h * count, "levels of the sum")
        _expect_at_most(levels[len(values) :], 0, "padding of the sum")
        signed = levels[: len(values)].astype(np.int64) - count * h
        values[:] = signed.astype(np.float64) * scale


def _field(parameters: BfvParameters, values: Update, chunk: slice, field: int) -> Update:
    """View the values that lie in one field of the coefficients of one chunk."""
    offset = field * parameters.coefficients
    return values[offset + chunk.start : offset + chunk.stop]


def _expect_at_most(levels: Words, limit: int, subject: str) -> None:
    if levels.max(initial=0) > limit:
        raise OpeningFailed(subject, f"at most {limit}", "more")
