"""Federated algorithms as `(init, apply)`, and the term that one of them adds on the device.

They live in the contract because both sides run them: with a blind coordinator every agent applies
the server's step itself, on the same opened sum, and all must end bit-equal.

FedAvg   McMahan et al., arXiv:1602.05629v4, Algorithm 1: w <- w + eta * sum_k (n_k / n) (w_k - w).
         With eta = 1 this is the weighted mean of the clients' models.
FedProx  Li et al., arXiv:1812.06127v5, Algorithm 2: the same server step; each client minimises
         F_k(w) + mu/2 ||w - w_t||^2, that is, adds mu (w - w_t) to its gradient.
         Deviation: clients run a fixed number of epochs instead of solving to gamma-inexactness.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.terms import LocalTraining, Strategy

_BLOCK = 1 << 14  # values handled at once: 64 KiB of float32 stays in the cache
_EXPONENT = np.uint32(0x7F800000)  # bits of the exponent, biased by 127


@dataclass(frozen=True)
class ServerState:
    """The global model after `rounds` applied rounds; `theta` (P,) float32 is not written to."""

    theta: Theta
    rounds: int = 0


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm: `init(theta)`, then `apply(state, mean_update)` once per round.

    `mean_update` is (P,) float32: sum_k w_k delta_k / sum_k w_k, as the protections deliver it. It
    is handed over: its memory becomes the new theta's, since a device may not have room for both.
    """

    init: Callable[[Theta], ServerState]
    apply: Callable[[ServerState, NDArray[np.float32]], ServerState]


def federated_averaging(server_learning_rate: float = 1.0) -> Algorithm:
    """Return FedAvg; float32 arithmetic, value by value, so that every machine gets equal bits.

    Some processors, and any that a library has told to, take numbers below the smallest normal
    float32, 2^-126, for zero. So that all end alike, such numbers are zero here, with sign +, in
    theta, in the mean and in the result; and products below 2^-125 are, since it depends on the
    processor whether one that rounds up to 2^-126 counts as below it.
    """
    rate = np.array([server_learning_rate], np.float32)
    _flush(rate)

    def apply(state: ServerState, mean_update: NDArray[np.float32]) -> ServerState:
        for start in range(0, len(mean_update), _BLOCK):
            block = mean_update[start : start + _BLOCK]
            theta = state.theta[start : start + _BLOCK].copy()
            _flush(theta)
            _flush(block)
            block *= rate
            _flush(block, least_exponent=2)
            block += theta
            _flush(block)
        return ServerState(mean_update, state.rounds + 1)

    return Algorithm(init=ServerState, apply=apply)


def _flush(values: NDArray[np.float32], least_exponent: int = 1) -> None:
    """Set numbers below 2^(least_exponent - 127) to +0, in place; no mode changes integers."""
    bits = values.view(np.uint32)
    bits *= (bits & _EXPONENT) >= np.uint32(least_exponent << 23)


def algorithm(terms: LocalTraining) -> Algorithm:
    """Return the server's half of the run's strategy."""
    match terms.strategy:
        case Strategy.FED_AVG | Strategy.FED_PROX:
            return federated_averaging(terms.server_learning_rate)


def proximal_gradient(gradient: Theta, theta: Theta, theta_global: Theta, mu: float) -> None:
    """Add FedProx's mu (theta - theta_global) to `gradient` in place; nothing when mu is 0."""
    if mu:
        gradient += np.float32(mu) * (theta - theta_global)
