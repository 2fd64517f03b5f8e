"""What an update is bound to, and the numbers that follow from it.

Exactness is a theorem here, not a measurement. One coefficient of one ciphertext, with
q the modulus of the ciphertext, t = 2^T that of the plaintext, m the message in [0, t):

    c0 + c1·s = (q/t)·m + r + e   (mod q)       |r| ≤ 1/2, |e| ≤ 21

e is SEAL's noise: a centred binomial of 2 x 21 coin tosses, so 21 bounds it always and not only
probably; r is the rounding of q·m/t to an integer. The wire drops the d = 4 low bits of c0 and
the receiver puts their middle back, which adds an error of at most 2^(d-1) = 8.
A sum of K ciphertexts is therefore (q/t)·Σm plus an error of at most K·(21 + 1/2 + 8) = K·59/2, and
(q/t)·Σm ≡ (q/t)·(Σm mod t) (mod q). Decryption rounds t/q times that to the nearest integer mod t:

    the sum is exact, with certainty, if   K·59/2 < q/(2t),   that is   59·K·2^T < q.

Two further units of 59/2 are reserved beside the K summands: one for the 4 bits that are dropped
once more from the sum on its way down (at most 8), one for the correction by which the coordinator
of protection `sealed` takes the released self masks out (a public plaintext: at most 1/2).
Together they use less than 9 of 59; the rest exceeds by far what SEAL's RNS decryption needs
(Bajard, Eynard, Hasan, Zucca, eprint 2016/510, §3: of order q/gamma, about 1 with gamma > 2^60).
T is the largest integer with 59·(K + 2)·2^T < q.

Since no honest sum ever decrypts wrongly, IND-CPA of the scheme implies its IND-CPA^D
(Li and Micciancio, eprint 2020/1533, §3; eprint 2024/127 attacks schemes for which that fails):
the opened sum may be published.

The second unit holds whatever the number of masks: the correction is the sum of all released self
masks and of all leftover pairwise masks, reduced modulo t, and enters once, as one plaintext.

Masks and tags do not disturb the sum. Every mask is taken out modulo t = 2^T, and the sum of the
packed coefficients is below 2^T: fields hold K·2h ≤ 2^F - 1, the counters K·max(w_max, P) < 2^T,
the tags K·(2^31 - 2) < 2^T (`tags` refuses a larger K: above 2,219). So the sum modulo 2^T is the
sum of integers, which is what the tags are computed over.

Ring: N = 4096 and one prime of 60 bits; the Homomorphic Encryption Standard (2018, table 1,
ternary secret) allows 109 bits at 128-bit security and 75 at 192.

Fields: v = 2 or 3 values share a coefficient, F = ⌊T/v⌋ bits each. A value is one of L = 2h + 1
levels, and K·2h ≤ 2^F - 1, so a field never carries into the next. L is odd: zero is a level.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import InvalidContext

RING_DEGREE = 4096  # N, coefficients per ciphertext
MODULUS = (1 << 60) - 16383  # q, the largest 60-bit prime that is 1 mod 2N
DROPPED_BITS = 4  # d, low bits of c0 that never travel
HALF_UNITS = 2 * 21 + 1 + (1 << DROPPED_BITS)  # 59: twice the error of one summand
RESERVED_SUMMANDS = 2  # dropped bits of the sum, self-mask correction
CHUNK_CIPHERTEXTS = 32  # 0.92 MB on the wire: below gRPC's 4 MiB, and the encoder's memory
MAX_HALF_LEVELS = (1 << 23) - 1  # h ≤ this: every level is exact in float32

COUNTERS = 16  # coefficients at the start of the counter chunk: COUNTER_*, then the histogram
COUNTER_SUMMANDS, COUNTER_WEIGHT, COUNTER_SATURATED, COUNTER_EXPONENTS = 0, 1, 2, 3
TAGS_PER_CHUNK = 2  # coefficients after the counters, for each chunk, the counters' own last
COHORT_DIGEST_SIZE = 32

_VALUES_PER_COEFFICIENT = {16: 2, 8: 3}
_PARAMETERS = struct.Struct("<B Q H I d B I Q B B B I B H H H")
_MASKED = ("masked", "sealed")
_SCHEME = 2  # rises with the meaning of a coefficient: 2 has tags and the histogram of exponents


@dataclass(frozen=True)
class UpdateContext:
    """What every chunk is bound to; a chunk that differs in any of it is refused."""

    run_id: bytes  # 16 bytes
    round: int  # u32
    attempt: int  # u16
    parameter_count: int  # P, values per update, 1 .. 2^31
    capacity: int  # K, most updates that one sum may hold, 1 .. 65535
    weight_cap: int  # public upper bound of a weight, 1 .. 2^32 - 1
    clip: float  # encrypted: values beyond ±clip saturate; rounded to float32 before use
    update_bits: int = 16  # encrypted: 16 (v = 2 values per coefficient) or 8 (v = 3)
    cohort: bytes = b""  # masked, sealed: digest of the cohort (`cohort.Cohort.digest`), 32 bytes
    # How many of the last values are no parameters and fill the clip: the histogram of exponents, a
    # member's own statement, leaves them out. Not bound: it changes nothing in how a sum is read.
    tail_length: int = 0
    # Protection `plain`, how an update is written; its sum has all values (`plain_forms`):
    listed: int = 0  # how many values before the tail it lists; 0: all, one after another
    quantised: bool = False  # values before the tail as 8-bit levels

    def __post_init__(self) -> None:
        if len(self.run_id) != 16:
            raise InvalidContext("length of run_id", "16 bytes", f"{len(self.run_id)} bytes")
        for name, low, high in (
            ("round", 0, (1 << 32) - 1),
            ("attempt", 0, (1 << 16) - 1),
            ("parameter_count", 1, 1 << 31),
            ("capacity", 1, (1 << 16) - 1),
            ("weight_cap", 1, (1 << 32) - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise InvalidContext(name, f"{low} .. {high}", getattr(self, name))
        if self.update_bits not in _VALUES_PER_COEFFICIENT:
            raise InvalidContext("update_bits", "16 or 8", self.update_bits)
        if len(self.cohort) not in (0, COHORT_DIGEST_SIZE):
            raise InvalidContext("cohort's digest", "0 or 32 bytes", f"{len(self.cohort)} bytes")
        if not 0 <= self.tail_length < self.parameter_count:
            raise InvalidContext(
                "tail_length", f"0 .. {self.parameter_count - 1}", self.tail_length
            )
        most = self.parameter_count - self.tail_length
        if not 0 <= self.listed <= most or (self.listed and self.quantised):
            raise InvalidContext(
                "listed values", f"0 .. {most}, 0 where values are quantised", self.listed
            )


@dataclass(frozen=True)
class PlainParameters:
    """The numbers of protection `plain`: it needs none beyond the context's own."""

    context: UpdateContext

    @cached_property
    def id(self) -> bytes:
        """Name everything that both sides must agree on (16 bytes)."""
        c = self.context
        numbers = struct.pack("<QHI", c.parameter_count, c.capacity, c.weight_cap)
        label = b"fedloom v1 plain parameters\0"
        if c.listed or c.quantised:
            label = b"fedloom v1 plain compressed parameters\0"
            numbers += struct.pack("<QQB", c.tail_length, c.listed, c.quantised)
        return hashlib.sha256(label + numbers).digest()[:16]


@dataclass(frozen=True)
class BfvParameters:
    """The numbers of every protection but `plain`, derived from the context. See the module.

    `masked` encrypts nothing and could use a larger T; it keeps the others' numbers so that one
    codec, one proof and one set of known answers serve all: its sums are theirs, bit for bit.
    """

    context: UpdateContext
    clip: float  # the context's, rounded to float32
    plain_bits: int  # T, the plaintext modulus is 2^T
    values_per_coefficient: int  # v
    field_bits: int  # F = ⌊T/v⌋
    half_levels: int  # h, a value is an integer in -h .. h
    protection: str = "encrypted"  # enters the id: no chunk serves two protections

    @classmethod
    def derive(cls, context: UpdateContext, protection: str = "encrypted") -> "BfvParameters":
        """Choose the most precise parameters for which every sum is exact.

        Raises InvalidContext where there are none: too large a capacity, counters that could
        overflow 2^T, masks without a cohort or a cohort without masks.
        """
        _check_cohort(context, protection)
        if context.listed or context.quantised:
            raise InvalidContext(f"form of values under {protection}", "all values", "another")
        clip = float(np.float32(min(max(context.clip, 0.0), 3e38)))
        if not (math.isfinite(context.clip) and 1e-20 <= clip <= 1e20):
            raise InvalidContext("clip", "a number in 1e-20 .. 1e20", context.clip)
        plain_bits = largest_plain_bits(context.capacity)
        values = _VALUES_PER_COEFFICIENT[context.update_bits]
        field_bits = plain_bits // values
        half_levels = min(((1 << field_bits) - 1) // (2 * context.capacity), MAX_HALF_LEVELS)
        if half_levels < 1:
            raise InvalidContext(
                "capacity",
                f"a sum whose {field_bits}-bit fields hold 3 levels per update",
                context.capacity,
            )
        largest_counter = context.capacity * max(context.weight_cap, context.parameter_count)
        if largest_counter >> plain_bits:
            raise InvalidContext(
                "capacity x max(weight_cap, parameter_count)",
                f"less than 2^{plain_bits}",
                largest_counter,
            )
        return cls(context, clip, plain_bits, values, field_bits, half_levels, protection)

    @cached_property
    def id(self) -> bytes:
        """Name everything that both sides must agree on (16 bytes)."""
        c = self.context
        numbers = _PARAMETERS.pack(
            _SCHEME,
            c.parameter_count,
            c.capacity,
            c.weight_cap,
            self.clip,
            c.update_bits,
            RING_DEGREE,
            MODULUS,
            self.plain_bits,
            self.values_per_coefficient,
            self.field_bits,
            self.half_levels,
            DROPPED_BITS,
            CHUNK_CIPHERTEXTS,
            COUNTERS,
            TAGS_PER_CHUNK,
        )
        label = f"fedloom v1 {self.protection} parameters\0".encode()
        return hashlib.sha256(label + numbers + c.cohort).digest()[:16]

    @cached_property
    def ciphertexts(self) -> int:
        """Count the ciphertexts that hold values."""
        return -(-self.context.parameter_count // (self.values_per_coefficient * RING_DEGREE))

    @property
    def coefficients(self) -> int:
        """Count the coefficients that hold values; value j·coefficients + i is field j of i."""
        return self.ciphertexts * RING_DEGREE

    @property
    def value_chunks(self) -> int:
        """Count the chunks of values; the chunk of this index carries the counters."""
        return -(-self.ciphertexts // CHUNK_CIPHERTEXTS)

    def chunk_ciphertexts(self, chunk: int) -> int:
        """Count the ciphertexts of one chunk, values (0 .. value_chunks-1) or counters."""
        if chunk < self.value_chunks:
            return min(CHUNK_CIPHERTEXTS, self.ciphertexts - chunk * CHUNK_CIPHERTEXTS)
        return -(-(COUNTERS + TAGS_PER_CHUNK * (self.value_chunks + 1)) // RING_DEGREE)

    def span(self, chunk: int) -> slice:
        """Return the place of a chunk of values among all coefficients."""
        start = chunk * CHUNK_CIPHERTEXTS * RING_DEGREE
        return slice(start, start + self.chunk_ciphertexts(chunk) * RING_DEGREE)

    @property
    def update_order(self) -> tuple[int, ...]:
        """List the chunks of an update: the counters last, since saturation is known last."""
        return tuple(range(self.value_chunks + 1))

    @property
    def sum_order(self) -> tuple[int, ...]:
        """List the chunks of a sum: the counters first, since the total weight is needed first."""
        return (self.value_chunks, *range(self.value_chunks))

    def encoded_size(self, header_size: int, per_ciphertext: int) -> int:
        """Count the bytes of all chunks, each with a header."""
        ciphertexts = self.ciphertexts + self.chunk_ciphertexts(self.value_chunks)
        return (self.value_chunks + 1) * header_size + ciphertexts * per_ciphertext


def largest_plain_bits(capacity: int) -> int:
    """Return the largest T with 59·(K + 2)·2^T < q, the bound of the module's docstring."""
    return ((MODULUS - 1) // (HALF_UNITS * (capacity + RESERVED_SUMMANDS))).bit_length() - 1


def _check_cohort(context: UpdateContext, protection: str) -> None:
    masked = protection in _MASKED
    if masked != bool(context.cohort):
        wanted, found = ("32", "0") if masked else ("0", "32")
        raise InvalidContext(f"cohort's digest for {protection}", f"{wanted} bytes", found)
