"""How a round's updates become one: `[aggregation]` of a run file, checked against the run.

A mean is all that protections can make of updates that nobody reads. The other rules read every
update, so that some faulty or malicious ones cannot decide the result: `coordinator.strategies`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from fedloom.terms import NEEDS_FACTORS, Encoding, LocalTraining, Protection, Strategy


class Rule(IntEnum):
    """What is made of the updates; each but MEAN has a file in `coordinator.strategies.robust`."""

    MEAN = 1
    MEDIAN = 2
    TRIMMED_MEAN = 3
    KRUM = 4
    MULTI_KRUM = 5
    GEOMETRIC_MEDIAN = 6
    NORM_BOUND = 7


_KRUM = (Rule.KRUM, Rule.MULTI_KRUM)
OWNERS: dict[str, tuple[Rule, ...]] = {
    "trim": (Rule.TRIMMED_MEAN,),
    "faulty": _KRUM,
    "selected": (Rule.MULTI_KRUM,),
    "iterations": (Rule.GEOMETRIC_MEDIAN,),
    "smoothing": (Rule.GEOMETRIC_MEDIAN,),
    "bound": (Rule.NORM_BOUND,),
}
DEFAULTS: dict[Rule, dict[str, float]] = {
    Rule.GEOMETRIC_MEDIAN: {"iterations": 32, "smoothing": 1e-6}
}
MAX_ITERATIONS = 1_000
# Whose updates are a movement and nothing else, of which any device's may be left out.
MOVEMENTS = (
    Strategy.FED_AVG,
    Strategy.FED_PROX,
    Strategy.FED_AVG_M,
    Strategy.FED_ADAGRAD,
    Strategy.FED_ADAM,
    Strategy.FED_YOGI,
)


@dataclass(frozen=True)
class Aggregation:
    """A rule and its numbers; those that it has no use for are 0."""

    rule: Rule = Rule.MEAN
    trim: float = 0.0  # share of the values that is cut at each end, below 1/2
    faulty: int = 0  # f: most updates that may be anything
    selected: int = 0  # m: updates that MULTI_KRUM averages; 0: n - f - 2
    iterations: int = 0  # most passes over the updates
    smoothing: float = 0.0  # nu: distances below count as this
    bound: float = 0.0  # M: largest L2 norm of an update

    @property
    def is_mean(self) -> bool:
        """Whether updates are added as they come, under any protection."""
        return self.rule is Rule.MEAN

    def problems(self, encoding: Encoding, training: LocalTraining, minimum: int) -> Iterator[str]:
        """Say what keeps the rule from this run, each time with the nearest choice that works."""
        name = self.rule.name.lower()
        for key, owners in OWNERS.items():
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                yield f"aggregation.{key}: expected a finite number of at least 0, found {value}"
            elif value and self.rule not in owners:
                told = " or ".join(f'"{owner.name.lower()}"' for owner in owners)
                yield f"aggregation.{key}: expected 0 unless aggregation.rule is {told}"
        if self.is_mean:
            return
        if encoding.protection is not Protection.PLAIN:
            yield (
                f'aggregation.rule: "{name}" reads every update, which protection.kind = '
                f'"{encoding.protection.name.lower()}" hides from the coordinator; use '
                'protection.kind = "plain", or aggregation.rule = "mean" with a smaller '
                "protection.clip, which bounds each value of an update under every other protection"
            )
        if training.strategy not in MOVEMENTS:
            yield (
                f'aggregation.rule: "{name}" leaves updates out, while the server of '
                f'"{training.strategy.name.lower()}" has to count them all; use '
                'training.strategy = "fed_avg" or "fed_prox"'
            )
        if training.lora in NEEDS_FACTORS:
            yield (
                f'aggregation.rule: "{name}" and training.lora = "{training.lora.name.lower()}" '
                'both say what is made of the updates; use aggregation.rule = "mean", or '
                'training.lora = "ffa"'
            )
        yield from self._number_problems(minimum)

    def _number_problems(self, minimum: int) -> Iterator[str]:
        if self.rule is Rule.TRIMMED_MEAN and not 1 / minimum <= self.trim < 0.5:
            yield (
                f"aggregation.trim: expected a share of at least 1/cohort.minimum = "
                f"{1 / minimum:g}, which cuts one update, and below 0.5, found {self.trim}; "
                '"median" needs none'
            )
        if self.rule in _KRUM and not (self.faulty and minimum > 2 * self.faulty + 2):
            yield (
                "aggregation.faulty: expected at least 1 and cohort.minimum above 2 faulty + 2, "
                f"found faulty = {self.faulty} and cohort.minimum = {minimum}; fewer agents go "
                'with "median"'
            )
        if self.selected > minimum - self.faulty - 2:
            yield (
                f"aggregation.selected: expected at most cohort.minimum - faulty - 2 = "
                f"{minimum - self.faulty - 2}, found {self.selected}"
            )
        if self.rule is Rule.GEOMETRIC_MEDIAN and not (
            1 <= self.iterations <= MAX_ITERATIONS and self.smoothing > 0
        ):
            yield (
                f"aggregation: expected iterations in 1..{MAX_ITERATIONS} and smoothing above 0, "
                f"found {self.iterations} and {self.smoothing}"
            )
        if self.rule is Rule.NORM_BOUND and not self.bound:
            yield "aggregation.bound: expected the largest L2 norm of an update, found 0"


MEAN = Aggregation()
