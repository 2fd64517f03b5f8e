"""`[compression]` of a run file, checked against the rest of the run."""

from collections.abc import Iterator

from coordinator.aggregation import Aggregation
from fedloom.compression import Compression
from fedloom.terms import Encoding, Protection

DEFAULT_SHARE = 0.1


def compression_problems(
    kind: Compression, encoding: Encoding, aggregation: Aggregation
) -> Iterator[str]:
    """Say what keeps a compression from this run, each time with the nearest choice that works."""
    if not kind.needs_plain:
        return
    name = kind.name.lower()
    if encoding.protection is not Protection.PLAIN:
        nearest = (
            'compression.kind = "random_mask", whose places are the same for all'
            if kind is Compression.TOP_K
            else "protection.update_bits = 8"
        )
        yield (
            f'compression.kind: "{name}" makes updates that only who reads them can add, which '
            f'protection.kind = "{encoding.protection.name.lower()}" lets nobody do; use '
            f'{nearest}, or protection.kind = "plain"'
        )
    if not aggregation.is_mean:
        yield (
            f'compression.kind: "{name}" goes with aggregation.rule = "mean", because '
            f'"{aggregation.rule.name.lower()}" reads updates value by value from the spool; use '
            'compression.kind = "random_mask"'
        )
