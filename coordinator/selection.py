"""Who is invited to a round."""

import random
from collections.abc import Set


def select(candidates: Set[str], count: int, draw: str) -> frozenset[str]:
    """Return a uniform random sample of at most `count` candidates; `draw` names and fixes it."""
    if len(candidates) <= count:
        return frozenset(candidates)
    chooser = random.Random(draw)  # noqa: S311 - fairness, not secrecy
    return frozenset(chooser.sample(sorted(candidates), count))
