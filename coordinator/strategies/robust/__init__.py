"""Rules that some faulty updates cannot decide: one paper, one file. They read every update."""

from coordinator.aggregation import Rule
from coordinator.strategies.robust import (
    geometric_median,
    krum,
    median,
    norm_bound,
    trimmed_mean,
)
from coordinator.strategies.robust.updates import RobustRule

__all__ = ["RULES", "RobustRule"]

RULES: dict[Rule, RobustRule] = {
    rule.rule: rule
    for rule in (
        median.RULE,
        trimmed_mean.RULE,
        krum.KRUM,
        krum.MULTI_KRUM,
        geometric_median.RULE,
        norm_bound.RULE,
    )
}
