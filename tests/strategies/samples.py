"""Terms of any strategy, with no more than it needs."""

from typing import Any

from fedloom.strategies import RULES
from fedloom.terms import (
    STRATEGY_DEFAULTS,
    LocalTraining,
    Optimizer,
    Strategy,
    Weighting,
)

NEEDED: dict[Strategy, dict[str, Any]] = {
    Strategy.FED_NOVA: {"optimizer": Optimizer.SGD, "auxiliary_scale": 2.0**-6},
    Strategy.SCAFFOLD: {
        "optimizer": Optimizer.SGD,
        "weighting": Weighting.UNIFORM,
        "population": 4,
        "auxiliary_scale": 0.25,
    },
    Strategy.FED_DYN: {"weighting": Weighting.UNIFORM, "population": 4},
}


def terms_of(strategy: Strategy, **changes: Any) -> LocalTraining:
    """Return terms of this strategy."""
    values = STRATEGY_DEFAULTS.get(strategy, {}) | NEEDED.get(strategy, {}) | changes
    return LocalTraining(strategy=strategy, **values)


# FED_MA needs a layout that is a chain of layers, and takes weights over: test_fedma.
ALL_TERMS = [terms_of(strategy) for strategy in RULES if strategy is not Strategy.FED_MA]
