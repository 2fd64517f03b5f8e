"""From an update to chunks of coefficients, and back: what all protections but `plain` work on.

The values come first and the counters last (`parameters.update_order`); in a sum it is the other
way round. The chunk of index `value_chunks` carries the counters: 0 updates (1 each), 1 weight,
2 saturated values, 3-15 the histogram of exponents, from 16 on two tags for each chunk of values,
then two for the counters themselves, then zeros.

Steps are functions from an iterator over (chunk, coefficients) to another one, in this order:

    device    pack → tag → mask (masked, sealed) → encrypt (encrypted, sealed) → frame
    opening   unframe → decrypt (encrypted, sealed) → verify → unpack

The coordinator adds, and takes the masks out of the sum in one correction. A step's halves lie in
one file: `chunks` and `codec`, `tags`, `masks`, `ciphertexts` or `masked`.
"""

import numpy as np
from numpy.typing import NDArray

from .codec import Chunks, Words, pack, unpack
from .errors import OpeningFailed
from .exponents import BUCKETS, bucket
from .parameters import (
    COUNTER_EXPONENTS,
    COUNTER_SATURATED,
    COUNTER_SUMMANDS,
    COUNTER_WEIGHT,
    COUNTERS,
    RING_DEGREE,
    TAGS_PER_CHUNK,
    BfvParameters,
)
from .protection import OpenedSum


def packed(
    parameters: BfvParameters,
    update: NDArray[np.float32],
    weight: int,
    rng: np.random.Generator,
) -> Chunks:
    """Quantise, pack and count an update that `codec.check_update` has passed."""
    saturated = 0
    for chunk in range(parameters.value_chunks):
        coefficients, clipped = pack(parameters, update, weight, parameters.span(chunk), rng)
        saturated += clipped
        yield chunk, coefficients
    last = parameters.value_chunks
    counters = np.zeros(parameters.chunk_ciphertexts(last) * RING_DEGREE, np.uint64)
    counters[COUNTER_SUMMANDS] = 1
    counters[COUNTER_WEIGHT] = weight
    counters[COUNTER_SATURATED] = saturated
    context = parameters.context
    ranged = update[: context.parameter_count - context.tail_length]
    counters[COUNTER_EXPONENTS + bucket(ranged, parameters.clip)] = 1
    yield last, counters


def unpacked(parameters: BfvParameters, chunks: Chunks, count: int) -> OpenedSum:
    """Read the sum of `count` updates; raises OpeningFailed where it cannot be one."""
    counters = next(chunks)[1]
    _check_counters(parameters, counters, count)
    total_weight, saturated = int(counters[COUNTER_WEIGHT]), int(counters[COUNTER_SATURATED])
    mean = np.empty(parameters.context.parameter_count, np.float32)
    for chunk, summed in chunks:
        unpack(parameters, summed, parameters.span(chunk), count, total_weight, mean)
    histogram = counters[COUNTER_EXPONENTS : COUNTER_EXPONENTS + BUCKETS]
    exponents = tuple(int(members) for members in histogram)
    return OpenedSum(mean, total_weight, saturated, count, exponents)


def _check_counters(parameters: BfvParameters, counters: Words, count: int) -> None:
    context = parameters.context
    weight, saturated = int(counters[COUNTER_WEIGHT]), int(counters[COUNTER_SATURATED])
    histogram = counters[COUNTER_EXPONENTS : COUNTER_EXPONENTS + BUCKETS]
    end_of_tags = COUNTERS + TAGS_PER_CHUNK * (parameters.value_chunks + 1)
    possible = (
        int(counters[COUNTER_SUMMANDS]) == count
        and count <= weight <= count * context.weight_cap
        and saturated <= count * context.parameter_count
        and int(histogram.max()) <= count
        and int(histogram.sum()) == count
        and not counters[end_of_tags:].any()
    )
    if not possible:
        raise OpeningFailed("counters", f"those of a sum of {count} updates", "others")
