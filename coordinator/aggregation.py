"""How a round's updates become one: `[aggregation]` of a run file, checked against the run.

A mean is all that protections can make of updates that nobody reads. The other rules read every
update, so that some faulty or malicious ones cannot decide the result: `coordinator.strategies`.
With groups, agents apply a rule to the groups' means, under any protection:
`fedloom.strategies.grouped`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fedloom.terms import (
    MAX_GROUPS,
    MINIMUM_SUM,
    MOVEMENTS,
    NEEDS_FACTORS,
    Encoding,
    GroupRule,
    LocalTraining,
    Protection,
    Strategy,
)


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
_FIXED: dict[str, float] = {"iterations": 0, "smoothing": 0.0}  # with groups
DEFAULTS: dict[Rule, dict[str, float]] = {
    Rule.GEOMETRIC_MEDIAN: {"iterations": 32, "smoothing": 1e-6}
}
MAX_ITERATIONS = 1_000
_GROUP_RULES = {Rule[rule.name]: rule for rule in GroupRule}


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
    groups: int = 1  # G: sums of a round, whose means agents apply the rule to; 1: one of all

    @property
    def is_mean(self) -> bool:
        """Whether updates are added as they come, under any protection, into one sum."""
        return self.rule is Rule.MEAN

    @property
    def group_terms(self) -> dict[str, Any]:
        """What agents are told of the groups, as keys of `LocalTraining`.

        Nothing where it is wrong: `problems` says so in the words of a run file.
        """
        if list(self._group_problems()) or self.groups == 1:
            return {"groups": 0, "group_rule": GroupRule.MEDIAN, "group_trim": 0.0}
        rule = _GROUP_RULES[self.rule]
        return {"groups": self.groups, "group_rule": rule, "group_trim": self.trim}

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
        if training.strategy is Strategy.FED_MA:
            yield from self._matching_problems(encoding)
            return
        if self.groups != 1:
            yield from self._group_problems()
            yield from self._group_surroundings(training, minimum)
            return
        if self.is_mean:
            return
        if encoding.protection is not Protection.PLAIN:
            yield (
                f'aggregation.rule: "{name}" reads every update, which protection.kind = '
                f'"{encoding.protection.name.lower()}" hides from the coordinator; use '
                'protection.kind = "plain"; or aggregation.groups = 3 or more with "median", which '
                'agents apply to the groups\' means; or aggregation.rule = "mean" with a smaller '
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

    def _matching_problems(self, encoding: Encoding) -> Iterator[str]:
        if encoding.protection is not Protection.PLAIN:
            yield (
                'training.strategy: "fed_ma" matches the neurons of every agent, which '
                f'protection.kind = "{encoding.protection.name.lower()}" hides from the '
                'coordinator; use protection.kind = "plain", or training.strategy = "fed_avg"'
            )
        if not self.is_mean or self.groups != 1:
            yield (
                'aggregation: expected rule = "mean" and one group with "fed_ma", which makes one '
                'model of the agents\' in its own way; use training.strategy = "fed_avg"'
            )

    def _group_problems(self) -> Iterator[str]:
        if self.groups != 1 and not 3 <= self.groups <= MAX_GROUPS:
            yield (
                f"aggregation.groups: expected 1, or 3..{MAX_GROUPS}, of which a rule can leave "
                f"some out, found {self.groups}"
            )
        elif self.groups != 1 and self.rule not in _GROUP_RULES:
            told = " or ".join(f'"{rule.name.lower()}"' for rule in _GROUP_RULES)
            yield (
                f"aggregation.rule: expected {told} with aggregation.groups, found "
                f'"{self.rule.name.lower()}"; without groups every rule goes with protection.kind '
                '= "plain"'
            )
        elif self.rule is Rule.TRIMMED_MEAN and not 1 / self.groups <= self.trim < 0.5:
            yield (
                f"aggregation.trim: expected a share of at least 1/groups = {1 / self.groups:g}, "
                f'which cuts one group, and below 0.5, found {self.trim}; "median" needs none'
            )
        elif {key: getattr(self, key) for key in _FIXED} != _FIXED | DEFAULTS.get(self.rule, {}):
            yield "aggregation: expected the default iterations and smoothing with groups"

    def _group_surroundings(self, training: LocalTraining, minimum: int) -> Iterator[str]:
        if minimum < MINIMUM_SUM * self.groups:
            yield (
                f"cohort.minimum: expected at least {MINIMUM_SUM} for each of the {self.groups} "
                f"groups, {MINIMUM_SUM * self.groups}, found {minimum}; fewer agents go with fewer "
                "groups, or with one sum and a smaller protection.clip"
            )
        if training.strategy not in MOVEMENTS:
            yield (
                "aggregation.groups: expected a strategy whose server may leave updates out, found "
                f'"{training.strategy.name.lower()}"; use training.strategy = "fed_avg"'
            )
        if training.lora in NEEDS_FACTORS:
            yield (
                f"aggregation.groups: expected a LoRA rule that takes means, found "
                f'"{training.lora.name.lower()}", which takes every agent\'s factors; use '
                'training.lora = "ffa"'
            )

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
        if self.selected and self.selected > minimum - self.faulty - 2:
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
