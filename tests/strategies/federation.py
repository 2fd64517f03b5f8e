"""A federation in a few lines: the product's algorithms between devices that are functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.engine import LocalUpdate
from edge_agent.held_updates import HeldUpdate
from edge_agent.local_rules import (
    LocalSteps,
    Outgoing,
    joined,
    outgoing,
    prunes_rank,
    remembered,
    strategys,
)
from edge_agent.ranks import OwnRank
from fedloom.plans import TrainableTensor
from fedloom.schedules import round_terms
from fedloom.strategies import Layout, Memory, ServerState, algorithm, update_length
from fedloom.strategies.ditto import personal_terms, pull
from fedloom.strategies.portions import keeps_own_model, parts_of, sends_everything, start_of
from fedloom.terms import LocalTraining, LoraRule, Personal, Weighting, steps_of

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Gradient = Callable[[Float64], Float64]
EVERYTHING: dict[str, Any] = {  # is sent
    "lora": LoraRule.FEDIT,
    "personal": Personal.NONE,
    "head_steps": 0,
    "personal_lambda": 0.0,
    "weighting": Weighting.UNIFORM,  # which every strategy takes
    "rank_penalty": 0.0,
    "rank_decay": 0.0,
}


@dataclass
class Device:
    """A device whose loss is known by its gradient; `samples` decide its weight and its steps."""

    gradient: Gradient
    samples: int
    memory: Memory = ()
    rank: int = 0  # under HetLoRA; 0: the layout's


def layout_of(theta: Float32) -> Layout:
    """Return the layout of a model without an adapter."""
    return (TrainableTensor("weight", (len(theta),), 0),)


def move(device: Device, state: ServerState, terms: LocalTraining, layout: Layout) -> Outgoing:
    """Train one device as an agent does, whole batches at once."""
    parts = None if sends_everything(terms) else parts_of(terms, layout, state.rounds)
    linear = algorithm(terms, layout).linear(state, strategys(terms, device.memory))
    start = start_of(terms, layout, state.theta, device.memory)
    if terms.lora is LoraRule.HETLORA:
        return move_ranks(device, state, terms, layout)
    delta, own = trained(device, start, terms, linear, parts), None
    if terms.personal is Personal.DITTO:
        before = device.memory[-1]
        drawn = pull(before, state.theta, terms.personal_lambda)
        own = before + trained(device, before, personal_terms(terms), drawn, parts)
    elif keeps_own_model(terms):
        own = start + delta
    update = LocalUpdate(delta, device.samples, 0.0)
    sent = outgoing(terms, state, device.memory, update, layout, own)
    return at_once(terms, state, layout, sent) if terms.is_asynchronous else sent


def at_once(terms: LocalTraining, state: ServerState, layout: Layout, sent: Outgoing) -> Outgoing:
    """Have the next sum take what was trained from the state that it is applied to."""
    return joined(terms, state, layout, held_since(state.rounds, sent))


def held_since(base_rounds: int, sent: Outgoing) -> HeldUpdate:
    """Hold what a training gave that began when so many rounds had been applied."""
    return HeldUpdate(base_rounds, 1, sent.values, np.zeros(0, np.float32), sent.weight, 0.0, 0.0)


def move_ranks(
    device: Device, state: ServerState, terms: LocalTraining, layout: Layout
) -> Outgoing:
    """Train a device of a rank of its own, as an agent does."""
    ranks = OwnRank.of(terms, layout, device.rank, device.memory)
    start, parts = ranks.start(state.theta), parts_of(terms, layout, state.rounds)
    moved = LocalUpdate(
        trained(device, start, terms, None, ranks.parts(parts)), device.samples, 0.0
    )
    update, kept = ranks.finished(state.theta, start, moved)
    return outgoing(terms, state, device.memory, update, layout, kept)


def trained(
    device: Device, start: Float32, terms: LocalTraining, linear: Float32 | None, parts: Any
) -> Float32:
    """Return what a training moves, as an engine does it."""
    steps = steps_of(terms, device.samples)
    local, theta = LocalSteps(start, terms, steps, linear, parts), start.copy()
    for _ in range(steps):
        local.step(theta, np.asarray(device.gradient(theta.astype(np.float64)), np.float32))
    moved: Float32 = theta - start
    return moved


def mean_of(sent: Sequence[Outgoing]) -> Float32:
    """Return what a protection delivers: the mean in float64, rounded once."""
    total = sum(one.weight for one in sent)
    summed = sum(one.weight * one.values.astype(np.float64) for one in sent)
    return np.asarray(summed / total, np.float32)


def first_state(terms: LocalTraining, theta: Float32, devices: Sequence[Device]) -> ServerState:
    """Begin a run."""
    for device in devices:
        count = remembered(terms) - keeps_own_model(terms)
        device.memory = tuple(np.zeros(len(theta), np.float32) for _ in range(count))
        if keeps_own_model(terms):
            device.memory = (*device.memory, theta.copy())
        if prunes_rank(terms):
            device.memory = (np.zeros(1, np.float32),)
    return algorithm(replace(terms, **EVERYTHING)).init(theta)


def run_round(
    terms: LocalTraining,
    state: ServerState,
    devices: Sequence[Device],
    rounds: int = 1,
    layout: Layout | None = None,
) -> ServerState:
    """Let these devices take part in a round, all of whose updates come into the sum."""
    layout = layout or layout_of(state.theta)
    now = round_terms(terms, state.rounds, rounds)
    sent = [move(device, state, now, layout) for device in devices]
    for device, one in zip(devices, sent, strict=True):
        assert len(one.values) == update_length(terms, layout, state.rounds)
        device.memory = one.remembered(math.inf)
    return algorithm(terms, layout).apply(state, mean_of(sent), len(sent))


def run(
    terms: LocalTraining,
    theta: Float32,
    devices: Sequence[Device],
    rounds: int,
    sampled: Callable[[int], Sequence[int]] | None = None,
    layout: Layout | None = None,
) -> Float32:
    """Return theta after so many rounds; `sampled` says who takes part in a round."""
    state = first_state(terms, theta, devices)
    for number in range(rounds):
        chosen = range(len(devices)) if sampled is None else sampled(number)
        state = run_round(terms, state, [devices[index] for index in chosen], rounds, layout)
    return state.theta
