"""What a run's terms do between a gradient and the next theta, whatever computes the gradient.

An engine gives the mean gradient of a batch; `LocalSteps` clips it, adds what the strategy adds,
and lets the optimiser step. All of it works on flat float32 vectors (P,), in place.

    gradient <- clip(gradient) + linear + mu (theta - start) + d penalty / d theta
    theta    <- optimiser(theta, gradient, learning rate of this step)

`linear` is SCAFFOLD's c - c_i or FedDyn's -g_k, mu is FedProx's mu or FedDyn's alpha: the gradient
of F_k(theta) + <linear, theta> + mu/2 |theta - start|^2; the penalty is HetLoRA's. Only the data's
gradient is clipped: a strategy's terms are no outliers. Parts that rest in a step end it as they
began it: no gradient, no momentum and no decay moves them, and they do not count in the norm that
is clipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_agent.engine import LocalUpdate
from edge_agent.held_updates import HeldUpdate
from edge_agent.optimisers import Gradient, Optimizer, Vector, optimizer_for
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.schedules import effective_steps, step_factor
from fedloom.strategies import (
    RULES,
    Layout,
    Memory,
    ServerState,
    algorithm,
    proximal_gradient,
)
from fedloom.strategies.arithmetic import blocks
from fedloom.strategies.error_feedback import return_cut
from fedloom.strategies.fedma import label_shares
from fedloom.strategies.parts import Parts
from fedloom.strategies.portions import keeps_own_model, resting
from fedloom.strategies.rule import Places
from fedloom.strategies.tails import add_penalty
from fedloom.terms import LocalTraining, steps_of, weight_of


@dataclass(frozen=True)
class Outgoing:
    """What leaves the device after a round's training, before it is encoded.

    `values` (U + M,) float32 is the update vector (`fedloom.strategies.update_length`) and room for
    the tail, whose shares (M,) in 0..1 are scaled into it by each cohort's clip; `weight` what it
    counts for, `memory` what the device remembers once the update is in a stored sum. `waiting` is
    one of its vectors, from which the values at `places` go as far as they are sent.
    """

    values: Vector
    weight: int
    memory: Memory = ()
    shares: Vector = field(default_factory=lambda: np.zeros(0, np.float32))
    waiting: Vector | None = None
    places: Places | None = None

    def scaled(self, clip: float) -> Vector:
        """Return `values`, the array itself, with the tail for a cohort of this clip."""
        tail = self.values[len(self.values) - len(self.shares) :]
        np.multiply(self.shares, np.float32(clip), out=tail)
        return self.values

    def remembered(self, clip: float) -> Memory:
        """Return `memory` as it is once the update is in a sum in which values end at `clip`."""
        if self.waiting is not None and self.places is not None:
            return_cut(self.waiting, self.places, self.values[: len(self.places)], clip)
        return self.memory


def outgoing(
    terms: LocalTraining,
    state: ServerState,
    memory: Memory,
    update: LocalUpdate,
    layout: Layout = (),
    own: Theta | None = None,
    shares: Sequence[float] = (),
) -> Outgoing:
    """Return what a round's training gives, under that round's terms; uses `update.delta` up.

    `own` is what the device keeps beside what its strategy has it remember: its own model after the
    round (P,), or its rank (1,); `shares` are the tail (`fedloom.quality`).
    """
    steps = effective_steps(terms, steps_of(terms, update.samples))
    sent = algorithm(terms, layout).sent(state, strategys(terms, memory), update.delta, steps)
    kept = sent.memory if own is None else (*sent.memory, own)
    tail, parts = np.array(shares, np.float32), [sent.values]
    if terms.sends_labels:
        parts.append(label_shares(layout, update.label_counts))
    values = np.concatenate([*parts, tail]) if shares or len(parts) > 1 else sent.values
    waiting = sent.memory[-1] if sent.places is not None else None
    weight = weight_of(terms, update.samples, update.factor_norm)
    return Outgoing(values, weight, kept, tail, waiting, sent.places)


def joined(terms: LocalTraining, state: ServerState, layout: Layout, held: HeldUpdate) -> Outgoing:
    """Return an update that this device holds as a sum on `state` takes it, by its staleness."""
    staleness = state.rounds - held.base_rounds
    values = algorithm(terms, layout).joined(state, held.values, staleness)
    room = np.zeros(len(held.shares), np.float32)
    return Outgoing(np.concatenate([values, room]), held.weight, (), held.shares)


def strategys(terms: LocalTraining, memory: Memory) -> Memory:
    """Return what the strategy, or what is sent of it, has the device remember.

    It is all that the device remembers but its own model and its rank.
    """
    return memory[: len(RULES[terms.strategy].remembers) + terms.error_feedback]


def remembered(terms: LocalTraining) -> int:
    """Return how many vectors a device remembers, each (P,).

    They are the strategy's, then what waits to be sent, then its own model. Where it prunes its
    rank it is that alone, (1,): no terms have both.
    """
    strategy = len(RULES[terms.strategy].remembers)
    return strategy + terms.error_feedback + keeps_own_model(terms) + prunes_rank(terms)


def prunes_rank(terms: LocalTraining) -> bool:
    """Tell whether a device's rank may fall from round to round."""
    return terms.rank_decay > 0


class LocalSteps:
    """The steps of one round on this device, from `start` (P,), which is not written to."""

    def __init__(
        self,
        start: Theta,
        terms: LocalTraining,
        steps: int,
        linear: Vector | None = None,
        parts: Parts | None = None,
    ) -> None:
        """Prepare the steps; without `parts` all of theta is trained and sent."""
        if parts is not None and terms.head_steps >= steps:
            raise Refused(
                Reason.TRAINING_FAILED,
                f"expected more than {terms.head_steps} steps, which train the head alone, found "
                f"{steps}",
            )
        self._start = start
        self._terms = terms
        self._steps = steps
        self._linear = linear
        self._parts = parts
        self._mu = terms.proximal_mu or terms.dynamic_alpha
        self._drawn = (slice(0, len(start)),) if parts is None else parts.shared  # to the start
        self._step = 0
        self._optimizer: Optimizer = optimizer_for(terms, len(start))

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """What is kept from step to step, each (P,): the arrays themselves, not copies."""
        return self._optimizer.vectors

    def restore(self, step: int, vectors: tuple[Vector, ...]) -> None:
        """Go on after so many steps from `vectors`, which are moved from now on."""
        self._step = step
        self._optimizer.restore(step, vectors)

    def step(self, theta: Theta, gradient: Gradient) -> None:
        """Move `theta` (P,) in place; `gradient` (P,), the mean over a batch, is used up."""
        parts = () if self._parts is None else resting(self._terms, self._parts, self._step)
        kept = [theta[part].copy() for part in parts]
        for part in parts:
            gradient[part] = 0
        clip_gradient(gradient, self._terms.gradient_clip)
        if self._linear is not None:
            gradient += self._linear
        for part in self._drawn:
            proximal_gradient(gradient[part], theta[part], self._start[part], self._mu)
        if self._parts is not None:
            add_penalty(gradient, theta, self._parts.tails, self._terms.rank_penalty)
        factor = step_factor(self._terms, self._step, self._steps)
        self._optimizer.step(theta, gradient, factor)
        for part, values in zip(parts, kept, strict=True):
            theta[part] = values
        self._step += 1


def clip_gradient(gradient: Gradient, norm: float) -> None:
    """Scale `gradient` in place so that its L2 norm is at most `norm`; 0 leaves it.

    Pascanu, Mikolov, Bengio, arXiv:1211.5063v2, Algorithm 1. The norm is summed in float64, so that
    a long vector does not lose its small values.
    """
    if norm == 0:
        return
    parts = (gradient[block] for block in blocks(len(gradient)))
    found = math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))
    if found > norm:
        gradient *= np.float32(norm / found)
