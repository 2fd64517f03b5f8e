"""Federated algorithms: one paper, one file, both halves; `rule.py` says what an algorithm is.

They live in the contract because both sides run them: with a blind coordinator every agent applies
the server's step itself, on the same opened sum, and all must end bit-equal. The coordinator does
the same where it may read the sums and exports a model.
"""

from fedloom.strategies import fedavg, fedavgm, feddyn, fednova, fedopt, fedprox, scaffold
from fedloom.strategies.fedavg import federated_averaging
from fedloom.strategies.fedprox import proximal_gradient
from fedloom.strategies.rule import Algorithm, Memory, Rule, Segment, Sent, ServerState, length
from fedloom.terms import LocalTraining, Strategy

__all__ = [
    "RULES",
    "Algorithm",
    "Memory",
    "Rule",
    "Segment",
    "Sent",
    "ServerState",
    "algorithm",
    "federated_averaging",
    "proximal_gradient",
    "update_length",
]

_ALL = (
    fedavg.RULE,
    fedprox.RULE,
    fedavgm.RULE,
    fedopt.FED_ADAGRAD,
    fedopt.FED_ADAM,
    fedopt.FED_YOGI,
    fednova.RULE,
    scaffold.RULE,
    feddyn.RULE,
)
RULES: dict[Strategy, Rule] = {rule.strategy: rule for rule in _ALL}


def algorithm(terms: LocalTraining) -> Algorithm:
    """Return the run's algorithm."""
    return RULES[terms.strategy].algorithm(terms)


def update_length(terms: LocalTraining, parameter_count: int) -> int:
    """Return U, how many values an update of the run has; P for a movement alone."""
    return length(RULES[terms.strategy].sends, parameter_count)
