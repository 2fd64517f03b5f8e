"""When a run ends before its rounds are done: its models get no better."""

import math
from dataclasses import dataclass

from fedloom.quality import Metric, Quality


@dataclass(frozen=True)
class PlateauRule:
    """End a run after `patience` reported rounds, above 0, in which the metric was no better."""

    patience: int = 0  # 0: never
    metric: Metric = Metric.LOSS
    minimum_delta: float = 0.0  # by less than this it is no better

    def __str__(self) -> str:
        better = f" by more than {self.minimum_delta:g}" if self.minimum_delta else ""
        rounds = "round" if self.patience == 1 else f"{self.patience} rounds"
        return f"{self.metric.value} got no better{better} in the last {rounds}"


NO_PLATEAU = PlateauRule()


@dataclass(frozen=True)
class Plateau:
    """The best that was reported, and how many rounds have reported nothing better since."""

    best: float | None = None
    rounds: int = 0

    def after(self, rule: PlateauRule, quality: Quality | None) -> "Plateau":
        """Count a round; one that nobody measured does not count."""
        value = None if quality is None else quality.value(rule.metric)
        if not rule.patience or value is None or not math.isfinite(value):
            return self
        if self.best is None:
            return Plateau(value)
        gain = value - self.best if rule.metric.rises else self.best - value
        return Plateau(value) if gain > rule.minimum_delta else Plateau(self.best, self.rounds + 1)

    def is_reached(self, rule: PlateauRule) -> bool:
        """Whether the run is to end."""
        return 0 < rule.patience <= self.rounds


BEGINNING = Plateau()
