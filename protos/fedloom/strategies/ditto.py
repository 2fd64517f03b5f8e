"""Ditto: Li et al., arXiv:2012.04221. Each device has a second model of its own.

    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w))

beside what it does for the global model w, from the w that the round began with. A device takes as
many steps for v_k as for its update. With v the v_k that a round begins with,

    lambda (v_k - w) = lambda (v_k - v) + lambda (v - w):

FedProx's term about the start, and a constant: what every engine can add to its gradients.
Deviation: v_k begins as the w that a device meets first, and moves in rounds whose sum it is in.
"""

from dataclasses import replace

import numpy as np

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import Vector
from fedloom.terms import STRATEGIES_WITH, LocalTraining, Personal, Strategy


def personal_terms(terms: LocalTraining) -> LocalTraining:
    """Return the terms of v_k's training: FedProx's with lambda for mu."""
    others = dict.fromkeys((name for name in STRATEGIES_WITH if name != "proximal_mu"), 0)
    return replace(
        terms,
        **others,  # type: ignore[arg-type]
        strategy=Strategy.FED_PROX,
        proximal_mu=terms.personal_lambda,
        server_learning_rate=1.0,
        personal=Personal.NONE,
        personal_lambda=0.0,
    )


def pull(own: Theta, theta: Theta, personal_lambda: float) -> Vector:
    """Return lambda (v - w)."""
    pulled: Vector = np.float32(personal_lambda) * (own - theta)
    return pulled
