"""`fedloom-agent` with steps of a millisecond at least and half of the time spent on saving."""

import time

from edge_agent import checkpoints, local_rules
from edge_agent.app import main
from edge_agent.optimisers import Optimizer
from fedloom.terms import LocalTraining

STEP_SECONDS = 0.001


def _slow_optimizer(terms: LocalTraining, parameter_count: int) -> Optimizer:
    """Return the product's optimiser, which sleeps before every step."""
    optimizer = _optimizer_for(terms, parameter_count)
    step = optimizer.step

    def slow(*arguments: object) -> None:
        time.sleep(STEP_SECONDS)
        step(*arguments)

    optimizer.step = slow
    return optimizer


if __name__ == "__main__":
    _optimizer_for = local_rules.optimizer_for
    local_rules.optimizer_for = _slow_optimizer
    checkpoints.INTERVAL_SECONDS = 0.0
    checkpoints.PAUSE_PER_SAVE = 1.0
    main()
