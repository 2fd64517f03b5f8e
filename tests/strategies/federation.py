"""A federation in a few lines: the product's algorithms between devices that are functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import LocalSteps, Outgoing, outgoing
from fedloom.schedules import round_terms
from fedloom.strategies import RULES, Memory, ServerState, algorithm, update_length
from fedloom.terms import LocalTraining, steps_of

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Gradient = Callable[[Float64], Float64]


@dataclass
class Device:
    """A device whose loss is known by its gradient; `samples` decide its weight and its steps."""

    gradient: Gradient
    samples: int
    memory: Memory = ()


def move(device: Device, state: ServerState, terms: LocalTraining) -> Outgoing:
    """Train one device as an engine does, whole batches at once."""
    steps = steps_of(terms, device.samples)
    linear = algorithm(terms).linear(state, device.memory)
    local, theta = LocalSteps(state.theta, terms, steps, linear), state.theta.copy()
    for _ in range(steps):
        local.step(theta, np.asarray(device.gradient(theta.astype(np.float64)), np.float32))
    update = LocalUpdate(theta - state.theta, device.samples, 0.0)
    return outgoing(terms, state, device.memory, update)


def mean_of(sent: Sequence[Outgoing]) -> Float32:
    """Return what a protection delivers: the mean in float64, rounded once."""
    total = sum(one.weight for one in sent)
    summed = sum(one.weight * one.values.astype(np.float64) for one in sent)
    return np.asarray(summed / total, np.float32)


def first_state(terms: LocalTraining, theta: Float32, devices: Sequence[Device]) -> ServerState:
    """Begin a run."""
    for device in devices:
        count = len(RULES[terms.strategy].remembers)
        device.memory = tuple(np.zeros(len(theta), np.float32) for _ in range(count))
    return algorithm(terms).init(theta)


def run_round(
    terms: LocalTraining, state: ServerState, devices: Sequence[Device], rounds: int = 1
) -> ServerState:
    """Let these devices take part in a round, all of whose updates come into the sum."""
    now = round_terms(terms, state.rounds, rounds)
    sent = [move(device, state, now) for device in devices]
    for device, one in zip(devices, sent, strict=True):
        assert len(one.values) == update_length(terms, len(state.theta))
        device.memory = one.memory
    return algorithm(terms).apply(state, mean_of(sent), len(sent))


def run(
    terms: LocalTraining,
    theta: Float32,
    devices: Sequence[Device],
    rounds: int,
    sampled: Callable[[int], Sequence[int]] | None = None,
) -> Float32:
    """Return theta after so many rounds; `sampled` says who takes part in a round."""
    state = first_state(terms, theta, devices)
    for number in range(rounds):
        chosen = range(len(devices)) if sampled is None else sampled(number)
        state = run_round(terms, state, [devices[index] for index in chosen], rounds)
    return state.theta
