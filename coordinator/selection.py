"""Who is invited to a round."""

import random
from collections.abc import Set


def select(candidates: Set[str], count: int, seed: int, round_number: int) -> frozenset[str]:
    """Return a uniform random sample of at most `count` candidates, fixed by seed and round."""
    if len(candidates) <= count:
        return frozenset(candidates)
    chooser = random.Random(f"{seed}/{round_number}")  # noqa: S311 - fairness, not secrecy
    return frozenset(chooser.sample(sorted(candidates), count))
