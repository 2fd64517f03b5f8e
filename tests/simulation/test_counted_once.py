"""No update of an asynchronous run is in two sums, and none is too old, whatever fails when.

The coordinator's state machine and the file in which devices hold their updates, joined by
messages that are late, lost with their connection, or answered by a process that died meanwhile.
"""

import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
    Applied,
    Effect,
    Event,
    Invite,
    OpenCohort,
    PublishResult,
    Ready,
    RepeatCohort,
    SumFailed,
    SumStored,
    Tick,
    Uploaded,
)
from coordinator.rounds import handle
from coordinator.run_state import Phase, RunPolicy, RunState
from edge_agent.held_updates import HeldUpdate, HeldUpdates
from edge_agent.local_memory import SumPlace

AGENTS = "abcd"
SHA, NOTHING = bytes(32), np.zeros(1, np.float32)
agents = st.sampled_from(AGENTS)


@dataclass(frozen=True)
class Outcome:
    """A stored sum, with the updates that are in it."""

    round: int
    attempt: int
    slots: tuple[int, ...]
    updates: tuple[int, ...]
    staleness: tuple[int, ...]


@dataclass
class Agent:
    """A device; its process forgets all but the folder."""

    held: HeldUpdates
    inbox: deque[tuple[str, int, int]] = field(default_factory=deque)  # (step, round, attempt)
    applied: int = 0  # rounds of the history, which survive with the state's file
    invited: int = 0


class CountedOnce(RuleBasedStateMachine):
    """Any agent at any time."""

    @initialize(
        buffer=st.integers(1, 4), minimum=st.integers(1, 2), max_staleness=st.integers(0, 3)
    )
    def open(self, buffer: int, minimum: int, max_staleness: int) -> None:
        memory = Path("/dev/shm")  # noqa: S108 - where a file is synced at once
        self.folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        policy = RunPolicy(
            rounds=50,
            minimum_agents=minimum,
            cohort_size=4,
            needs_key=False,
            gathering_seconds=1e6,
            training_seconds=100.0,
            upload_seconds=100.0,
            applying_seconds=1e6,
            buffer=max(buffer, minimum),
            max_staleness=max_staleness,
        )
        self.now, self.made = 0.0, 0
        self.state = RunState(policy, deadline=policy.gathering_seconds)
        self.uploads: dict[str, int] = {}  # of the open attempt: which update
        self.history: list[Outcome] = []
        self.agents: dict[str, Agent] = {}
        for name in AGENTS:
            (Path(self.folder.name) / name).mkdir()
            self.agents[name] = Agent(self._disk(name))
        for name in AGENTS:
            self.connect(name)

    def _disk(self, name: str) -> HeldUpdates:
        return HeldUpdates(Path(self.folder.name) / name, bytes(16))

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def post(self, event: Event) -> None:
        self.state, effects = handle(self.state, event, self.now)
        for effect in effects:
            self.obey(effect)

    def obey(self, effect: Effect) -> None:
        match effect:
            case Invite(names):
                self.tell(names, "invitation")
            case OpenCohort():
                self.uploads.clear()
                self.tell(frozenset(self.state.cohort), "cohort")
            case RepeatCohort(name):
                self.tell(frozenset({name}), "cohort")
            case PublishResult(names):
                self.tell(names, "result")

    def tell(self, names: frozenset[str], step: str) -> None:
        for name in names & self.state.connected:
            self.agents[name].inbox.append((step, self.state.round, self.state.attempt))

    # devices

    @rule(name=agents)
    def connect(self, name: str) -> None:
        self.agents[name].inbox.clear()
        self.post(AgentConnected(name))

    @rule(name=agents)
    def cut(self, name: str) -> None:
        self.post(AgentDisconnected(name))

    @rule(name=agents)
    def die(self, name: str) -> None:
        before = self.agents[name]
        self.agents[name] = Agent(self._disk(name), applied=before.applied)
        self.post(AgentDisconnected(name))

    @rule(turns=st.lists(st.tuples(agents, st.integers(0, 19)), min_size=1, max_size=20))
    def go_on(self, turns: list[tuple[str, int]]) -> None:
        """Let devices do what is next, some of them to die in it, and sums be stored."""
        for name, luck in turns:
            if self.state.phase is Phase.SUMMING and luck > 1:
                self.store()
            if self.agents[name].inbox:
                self.step(name, dies=luck == 0)
            elif name not in self.state.connected and luck > 10:
                self.connect(name)

    def step(self, name: str, dies: bool) -> None:
        """Follow the next message; `dies`: between what it promises and what it sends."""
        agent = self.agents[name]
        step, number, attempt = agent.inbox.popleft()
        if step == "result" and len(self.history) and self.history[-1].round != number:
            return
        if step in ("invitation", "result"):
            self.catch_up(agent, number if step == "result" else number - 1)
        event: Event | None = None
        match step:
            case "invitation":
                agent.invited = number
                event = self.join(name, agent)
            case "cohort" if agent.invited == number:
                event = self.give(name, agent, number, attempt)
            case "result":
                event = Applied(name, number, SHA)
        if dies:
            self.die(name)
        if isinstance(event, Uploaded):  # its bytes may be there, whatever becomes of the device
            if self.takes_upload(name, number, attempt):
                self.post(event)
        elif event is not None and name in self.state.connected:
            self.post(event)

    def takes_upload(self, name: str, number: int, attempt: int) -> bool:
        """As `coordinator.uploads`."""
        state = self.state
        at_hand = state.phase is Phase.COLLECTING and (state.round, state.attempt)
        return at_hand == (number, attempt) and name not in state.uploaded

    def catch_up(self, agent: Agent, last: int) -> None:
        for outcome in self.history[agent.applied :]:
            if outcome.round <= last:
                agent.held.settle(outcome.round, outcome.attempt, outcome.slots)
                agent.applied += 1

    def join(self, name: str, agent: Agent) -> Event:
        held, policy = agent.held.read(), self.state.policy
        if held is None or agent.applied - held.base_rounds > policy.max_staleness:
            self.made += 1
            held = HeldUpdate(agent.applied, self.made, NOTHING, NOTHING, 1, 0.0, 0.0)
            agent.held.keep(held)
        return Ready(name, agent.invited, 0, base_rounds=held.base_rounds)

    def give(self, name: str, agent: Agent, number: int, attempt: int) -> Event | None:
        """Upload, if the coordinator still takes it."""
        held, state = agent.held.read(), self.state
        if held is None or name not in state.cohort:
            return None
        agent.held.propose(SumPlace(number, attempt, state.cohort.index(name)))
        if not self.takes_upload(name, number, attempt):
            return None
        self.uploads[name] = held.round
        return Uploaded(name, SHA)

    # the conductor

    @rule()
    @precondition(lambda self: self.state.phase is Phase.SUMMING)
    def store(self) -> None:
        state = self.state
        members = sorted(state.uploaded, key=state.cohort.index)
        self.history.append(
            Outcome(
                state.round,
                state.attempt,
                tuple(state.cohort.index(name) for name in members),
                tuple(self.uploads[name] for name in members),
                tuple(state.staleness[name] for name in members),
            )
        )
        self.post(SumStored())

    @rule()
    @precondition(lambda self: self.state.phase is Phase.SUMMING and self.state.failures < 1)
    def fail(self) -> None:
        self.post(SumFailed())

    @rule()
    def wait(self) -> None:
        self.now += 101.0
        if self.state.failures < 1:
            self.post(Tick())

    # laws

    @invariant()
    def every_update_is_in_one_sum_at_most(self) -> None:
        counted = [update for outcome in self.history for update in outcome.updates]
        assert len(counted) == len(set(counted))

    @invariant()
    def none_is_too_old(self) -> None:
        most = self.state.policy.max_staleness
        assert all(0 <= age <= most for one in self.history for age in one.staleness)


TestCountedOnce = CountedOnce.TestCase
TestCountedOnce.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
