"""Choose the next token from logits: greedy, or drawn from what temperature, top-k and top-p leave.

Nucleus (top-p) sampling: arXiv:1904.09751, section 3.1.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import Reason, Refused

Logits = NDArray[np.float32]  # (V,)
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; raises Refused(MALFORMED) for values out of range.

    `temperature` 0 is greedy, and the default. `top_k` 0 and `top_p` 1 leave every token. `seed`
    None draws anew each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature)
        if not (finite and 0 <= self.temperature <= MAX_TEMPERATURE):
            raise _refusal(f"temperature in 0..{MAX_TEMPERATURE:.0f}", self.temperature)
        if self.top_k < 0:
            raise _refusal("top_k of at least 0", self.top_k)
        if not 0 < self.top_p <= 1:
            raise _refusal("top_p above 0 and at most 1", self.top_p)
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise _refusal("seed in 0..2^64-1", self.seed)


class Sampler:
    """Chooses the tokens of one text."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: Logits) -> int:
        """Return the next token; raises Refused(PLAN_UNSUPPORTED) for logits without a largest."""
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):  # argmax finds a NaN first
            raise Refused(Reason.PLAN_UNSUPPORTED, f"expected finite logits, found {logits[best]}")
        if self._sampling.temperature == 0:
            return best
        tokens, probabilities = distribution(logits, self._sampling)
        drawn = np.searchsorted(np.cumsum(probabilities), self._generator.random(), side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])


def distribution(
    logits: Logits, sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that may follow, most probable first, and their probabilities.

    Temperature comes first, then top-k, then top-p: the shortest beginning of the list whose
    probabilities, among what top-k left, come to at least `top_p`. Ties go to the lower token.
    """
    order = np.argsort(-logits, kind="stable")  # (V,)
    if sampling.top_k:
        order = order[: sampling.top_k]
    # Differences first: a small temperature must not overflow.
    scaled = (logits[order].astype(np.float64) - float(logits[order[0]])) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:count], probabilities[:count]
        probabilities = probabilities / probabilities.sum()
    return order, probabilities


def _refusal(expected: str, found: object) -> Refused:
    return Refused(Reason.MALFORMED, f"expected {expected}, found {found}")
