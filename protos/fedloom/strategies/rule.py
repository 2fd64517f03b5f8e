"""What a federated algorithm is: the server's step, what an update holds, and the device's part.

The server's step is run by every agent on the same opened mean, and all must end bit-equal: with a
blind coordinator there is no other server. Both halves of an algorithm stand in one file, that of
its paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.adapters import Theta
from fedloom.strategies.arithmetic import Vector
from fedloom.terms import LocalTraining, Strategy

Memory = tuple[Vector, ...]  # what a device keeps from round to round, each (P,)
Places = NDArray[np.uint32]  # of values in a vector, ascending


@dataclass(frozen=True)
class ServerState:
    """The global state after `rounds` applied rounds; its arrays are not written to.

    `theta` (P,) float32 is the model, `vectors` are what the algorithm keeps beside it, each (P,).
    """

    theta: Theta
    rounds: int = 0
    vectors: tuple[Vector, ...] = ()


@dataclass(frozen=True)
class Sent:
    """What a device gives: `values` (U,), and what it keeps once they are in a stored sum.

    `places` (U,): where the values still are in the last vector of `memory`, from which they go as
    far as they are encoded (`error_feedback`); None: they are in none.
    """

    values: Vector
    memory: Memory = ()
    places: Places | None = None


@dataclass(frozen=True)
class Segment:
    """A part of an update vector; an update's segments lie one after another."""

    name: str
    per_parameter: bool = True  # P values; else one


MOVEMENT = Segment("movement")


def length(segments: tuple[Segment, ...], parameter_count: int) -> int:
    """Return U, how many values an update of these segments has."""
    return sum(parameter_count if segment.per_parameter else 1 for segment in segments)


def _no_linear_term(state: ServerState, memory: Memory) -> None:
    del state, memory


def _as_held(state: ServerState, held: Vector, staleness: int) -> Vector:
    del state, staleness
    return held


def _movement_alone(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
    del state, memory, steps
    return Sent(delta)


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm under one run's terms: `init(theta)`, then `apply` once per round.

    apply(state, mean_update, count): `mean_update` is (U,) float32, sum_k w_k u_k / sum_k w_k over
    `count` updates, as the protections deliver it. It is handed over: its memory becomes the new
    state's, since a device may not have room for both.

    linear(state, memory): the vector (P,) that a device adds to each of its gradients, or None.

    sent(state, memory, delta, steps): what a device gives after it has moved by `delta` (P,), which
    is handed over, in `steps` effective steps (`fedloom.schedules`). Its arithmetic is the device's
    own: nobody repeats it.

    joined(state, held, staleness): what a device gives to a sum of an asynchronous run. `held` (U,)
    is what it was to give (`sent`) when it had trained; `state` is the one that the sum is applied
    to, `staleness` rounds newer than the one that it trained from.
    """

    apply: Callable[[ServerState, Vector, int], ServerState]
    init: Callable[[Theta], ServerState] = ServerState
    linear: Callable[[ServerState, Memory], Vector | None] = _no_linear_term
    sent: Callable[[ServerState, Memory, Theta, float], Sent] = _movement_alone
    joined: Callable[[ServerState, Vector, int], Vector] = _as_held


@dataclass(frozen=True)
class Rule:
    """An algorithm as a run file names it, and what can be said of it whatever the terms."""

    strategy: Strategy
    name: str
    paper: str
    algorithm: Callable[[LocalTraining], Algorithm]
    needs: str = "a movement"  # from a device, in words for the table
    sends: tuple[Segment, ...] = (MOVEMENT,)
    keeps: tuple[str, ...] = ()  # at the server, beside theta: names of (P,) vectors
    remembers: tuple[str, ...] = ()  # on each device: names of (P,) vectors


def zeros(theta: Theta) -> Vector:
    """Return what a vector of sums begins with."""
    return np.zeros(len(theta), np.float32)
