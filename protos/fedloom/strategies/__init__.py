"""Federated algorithms: one paper, one file, both halves; `rule.py` says what an algorithm is.

They live in the contract because both sides run them: with a blind coordinator every agent applies
the server's step itself, on the same opened sum, and all must end bit-equal. The coordinator does
the same where it may read the sums and exports a model.
"""

from fedloom.strategies import (
    fedasync,
    fedavg,
    fedavgm,
    fedbuff,
    feddyn,
    fedma,
    fednova,
    fedopt,
    fedprox,
    scaffold,
)
from fedloom.strategies.compressed import compressed, compressed_length
from fedloom.strategies.fedavg import federated_averaging
from fedloom.strategies.fedprox import proximal_gradient
from fedloom.strategies.parts import Layout, travelling
from fedloom.strategies.portions import parts_of, sends_everything
from fedloom.strategies.rule import Algorithm, Memory, Rule, Segment, Sent, ServerState, length
from fedloom.terms import LocalTraining, Strategy

__all__ = [
    "RULES",
    "Algorithm",
    "Layout",
    "Memory",
    "Rule",
    "Segment",
    "Sent",
    "ServerState",
    "algorithm",
    "federated_averaging",
    "moved_length",
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
    fedbuff.RULE,
    fedasync.RULE,
    fedma.RULE,
)
RULES: dict[Strategy, Rule] = {rule.strategy: rule for rule in _ALL}


def algorithm(terms: LocalTraining, layout: Layout = ()) -> Algorithm:
    """Return the run's algorithm; without a layout only where everything is sent.

    Raises Refused(PLAN_UNSUPPORTED) where the layout does not fit what the terms send.
    """
    whole = compressed(RULES[terms.strategy].algorithm(terms), terms)
    if sends_everything(terms, layout):
        return whole
    parts_of(terms, layout, 0)  # or refuse
    return travelling(whole, lambda rounds: parts_of(terms, layout, rounds))


def update_length(terms: LocalTraining, layout: Layout, rounds: int = 0) -> int:
    """Return U, how many values an update has in the round after `rounds` applied ones.

    It is that of a movement alone where the strategy sends nothing else. Raises as `algorithm`.
    """
    parts = parts_of(terms, layout, rounds)
    sent = length(RULES[terms.strategy].sends, parts.shared_length)
    return compressed_length(terms, sent) + (fedma.outputs(layout) if terms.sends_labels else 0)


def moved_length(terms: LocalTraining, layout: Layout, rounds: int = 0) -> int:
    """Return R, how many values a sum has behind those of an update: the server alone moves them.

    Raises as `algorithm`.
    """
    parts = parts_of(terms, layout, rounds)
    return parts.applied_length - parts.shared_length
