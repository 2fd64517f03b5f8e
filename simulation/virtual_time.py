"""A run over devices of different speeds, on a clock that jumps: what waiting for the slow costs.

    rounds.handle ──effects──▶ Invite         who is idle trains from the newest state until a later
         ▲                     OpenCohort     time; updates go up, each weighed by its device
         │                     CloseCohort    their mean, in float64, rounded once
         └─events at a time─── PublishResult  the strategy's step, as every agent makes it

The state machine, the strategies and the rule by which a device holds an update are the product's;
the network is a delay, protections are left out (their sums are exact) and nobody fails. Devices
that hold an update answer an invitation in an order that the seed draws. Synchronous and
asynchronous runs go through the same code: their policies differ.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from coordinator.events import (
    AbandonRound,
    Applied,
    CloseCohort,
    CloseRound,
    Effect,
    Event,
    FinishRun,
    Invite,
    OpenCohort,
    PublishResult,
    Ready,
    SumStored,
    TakenUp,
    Tick,
    Uploaded,
)
from coordinator.rounds import handle
from coordinator.run_state import Phase, RunPolicy, RunState
from edge_agent.engine import LocalUpdate
from edge_agent.held_updates import HeldUpdate
from edge_agent.local_rules import Outgoing, joined, outgoing
from fedloom.adapters import Theta
from fedloom.errors import Refused
from fedloom.schedules import round_terms
from fedloom.strategies import Layout, ServerState, algorithm
from fedloom.terms import LocalTraining, weight_class

_SHA = bytes(32)  # whose value decides nothing here: all devices apply the same


@dataclass(frozen=True)
class Device:
    """A simulated device: how long it trains and sends, and what it learns from a state."""

    train: Callable[[Theta, LocalTraining, int], LocalUpdate]  # (theta, terms, round)
    training_seconds: float
    transfer_seconds: float  # of an update up, or a sum down


@dataclass(frozen=True)
class Moment:
    """The model after a round."""

    seconds: float  # since the run began
    rounds: int
    theta: Theta
    staleness: tuple[int, ...]  # of the updates in the sum


@dataclass
class _Activity:
    """What a device does: it trains, or holds an update, or waits for a round."""

    training: int = 0  # number of the training under way, by which a dropped one is known
    base_rounds: int | None = None  # of the state that is trained from; None: no training
    held: HeldUpdate | None = None
    round: int = 0  # that it was invited to last


@dataclass
class VirtualRun:
    """One run; `moments` yields the model after every round."""

    policy: RunPolicy
    terms: LocalTraining
    layout: Layout
    devices: Mapping[str, Device]
    theta: Theta
    now: float = 0.0
    _sums: dict[str, Outgoing] = field(default_factory=dict)
    _activities: dict[str, _Activity] = field(default_factory=dict)
    _moments: list[Moment] = field(default_factory=list)
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)  # of what happens at the same time

    def __post_init__(self) -> None:
        self._algorithm = algorithm(self.terms, self.layout)
        self._server = self._algorithm.init(self.theta.copy())
        self._state = RunState(self.policy, deadline=self.policy.gathering_seconds)
        self._activities = {name: _Activity() for name in self.devices}
        self._trainings = count(1)

    def moments(self) -> Iterator[Moment]:
        """Yield the model after each round, until the run is over; raises Refused if it fails."""
        self._post(TakenUp(frozenset(self.devices)))
        while not self._state.phase.over:
            self.now, _, happen = heapq.heappop(self._agenda)
            happen()
            yield from self._moments
            self._moments.clear()
        if self._state.reason is not None:
            raise Refused(self._state.reason, f"in round {self._state.round}")

    # the clock

    def _later(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), happen))

    def _post(self, event: Event) -> None:
        before = self._state
        self._state, effects = handle(before, event, self.now)
        if self._state.deadline != before.deadline or isinstance(event, TakenUp):
            self._later(max(0.0, self._state.deadline - self.now), partial(self._post, Tick()))
        for effect in effects:
            self._obey(effect, before)

    def _obey(self, effect: Effect, before: RunState) -> None:
        match effect:
            case Invite(agents):
                text = f"{self.terms.seed}/{self._state.round}/ready"
                for name in random.Random(text).sample(sorted(agents), len(agents)):  # noqa: S311
                    self._invited(name)
            case OpenCohort():
                self._collect()
            case CloseCohort():
                self._later(0.0, partial(self._post, SumStored()))
            case PublishResult(agents):
                self._apply(agents)
            case AbandonRound():
                self._sums.clear()
            case CloseRound():
                self._close(before)
            case FinishRun():
                pass
            case _:
                raise AssertionError(f"expected no {type(effect).__name__}: nobody fails or lies")

    # devices

    def _invited(self, name: str) -> None:
        activity = self._activities[name]
        activity.round = self._state.round
        base = activity.base_rounds if activity.held is None else activity.held.base_rounds
        if base is not None and self._server.rounds - base > self.terms.max_staleness:
            activity.base_rounds = activity.held = None
        if activity.held is not None:
            self._ready(name)
        elif activity.base_rounds is None:
            self._train(name)

    def _train(self, name: str) -> None:
        activity, device = self._activities[name], self.devices[name]
        server, number, training = self._server, self._state.round, next(self._trainings)
        activity.training, activity.base_rounds = training, server.rounds

        def done() -> None:
            if activity.training != training or activity.base_rounds is None:
                return  # dropped meanwhile
            activity.base_rounds = None
            activity.held = self._trained(device, server, number)
            self._ready(name)

        self._later(device.training_seconds, done)

    def _trained(self, device: Device, server: ServerState, number: int) -> HeldUpdate:
        terms = round_terms(self.terms, server.rounds, self.policy.rounds)
        update = device.train(server.theta, terms, number)
        sent = outgoing(terms, server, (), update, self.layout)
        nothing = np.zeros(0, np.float32)
        return HeldUpdate(
            server.rounds, number, sent.values, nothing, sent.weight, update.mean_loss, 0.0
        )

    def _ready(self, name: str) -> None:
        """Answer the newest invitation; one that is past by now is not answered."""
        activity = self._activities[name]
        if activity.held is not None:
            weight, base = weight_class(activity.held.weight), activity.held.base_rounds
            base = base if self.policy.is_asynchronous else 0
            self._post(Ready(name, activity.round, weight, base_rounds=base))

    # rounds

    def _collect(self) -> None:
        self._sums.clear()
        late = frozenset() if self.policy.is_asynchronous else self._state.invited
        for name in late - set(self._state.cohort):  # as a device that is told so
            self._activities[name].base_rounds = self._activities[name].held = None
        number = self._state.round
        for name in self._state.cohort:
            held = self._activities[name].held
            assert held is not None  # noqa: S101 - it said READY
            self._sums[name] = joined(self.terms, self._server, self.layout, held)
            self._later(self.devices[name].transfer_seconds, partial(self._upload, name, number))

    def _upload(self, name: str, number: int) -> None:
        if self._state.phase is Phase.COLLECTING and self._state.round == number:
            self._post(Uploaded(name, _SHA))

    def _apply(self, agents: frozenset[str]) -> None:
        sent = [self._sums[name] for name in self._state.cohort if name in self._state.uploaded]
        total = sum(one.weight for one in sent)
        summed = np.sum([one.weight * one.values.astype(np.float64) for one in sent], axis=0)
        mean = summed / total
        self._server = self._algorithm.apply(self._server, mean.astype(np.float32), len(sent))
        for name in self._state.uploaded:
            self._activities[name].held = None
        number = self._state.round
        for name in sorted(agents):
            applied = Applied(name, number, _SHA)
            self._later(self.devices[name].transfer_seconds, partial(self._post, applied))

    def _close(self, before: RunState) -> None:
        staleness = tuple(before.staleness[name] for name in before.uploaded)
        self._moments.append(
            Moment(self.now, self._server.rounds, self._server.theta.copy(), staleness)
        )
