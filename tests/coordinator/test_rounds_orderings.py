"""The state machine under any order of events: agents come, go, lie and repeat, and time passes.

The conductor's part is played honestly: an update counts once, a closed sum is stored or fails, a
crash forgets all but what the store keeps. The agents' part is not.
"""

from collections.abc import Callable

from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
    Applied,
    CloseRound,
    Declined,
    Effect,
    Event,
    FinishRun,
    KeyShared,
    Ready,
    Reject,
    SumFailed,
    SumStored,
    Tick,
    Uploaded,
)
from coordinator.rounds import MAX_ROUND_FAILURES, handle
from coordinator.run_state import Phase, RunPolicy, RunState
from fedloom.errors import Reason
from tests.coordinator.record import Record

AGENTS = "abcde"
SHA = bytes(32)
FOREVER = 10_000.0  # longer than every deadline
MAX_EVENTS_TO_THE_END = 500

agents = st.sampled_from(AGENTS)
reasons = st.sampled_from([Reason.TRAINING_FAILED, Reason.KEY_UNAVAILABLE, Reason.INTERNAL])
rounds_off = st.sampled_from([0, 0, 0, -1, 1])
policies = st.builds(
    RunPolicy,
    rounds=st.integers(1, 3),
    minimum_agents=st.integers(1, 3),
    cohort_size=st.integers(3, 5),
    needs_key=st.booleans(),
    gathering_seconds=st.just(300.0),
    training_seconds=st.just(100.0),
    upload_seconds=st.just(100.0),
    applying_seconds=st.just(100.0),
    seed=st.integers(0, 3),
)


class Orderings(RuleBasedStateMachine):
    """Any agent at any time; see the rules."""

    @initialize(policy=policies)
    def open(self, policy: RunPolicy) -> None:
        self.now = 0.0
        self.record = Record()
        self.state = RunState(policy, deadline=policy.gathering_seconds)

    def post(self, event: Event) -> None:
        before = self.state
        self.state, effects = handle(before, event, self.now)
        self.check_step(before, event, effects)
        for effect in effects:
            self.record.keep(before, self.state, effect)

    def check_step(self, before: RunState, event: Event, effects: tuple[Effect, ...]) -> None:
        after = self.state
        assert after.round - before.round in (0, 1)
        assert (after.round > before.round) <= (CloseRound() in effects)
        assert (after.attempt >= before.attempt) or after.round > before.round
        assert (after.phase.over and not before.phase.over) == (FinishRun() in effects)
        if FinishRun() in effects:
            assert not isinstance(event, AgentConnected | AgentDisconnected) or after.reason is None
        if before.phase.over:
            assert (after.phase, after.round, after.reason) == (
                before.phase,
                before.round,
                before.reason,
            )
            assert all(isinstance(effect, Reject) for effect in effects)

    # agents

    @rule(agent=agents)
    def connect(self, agent: str) -> None:
        self.post(AgentConnected(agent))

    @rule(agent=agents)
    def disconnect(self, agent: str) -> None:
        self.post(AgentDisconnected(agent))

    @rule(agent=agents, off=rounds_off, weight_class=st.integers(0, 24))
    def ready(self, agent: str, off: int, weight_class: int) -> None:
        self.post(Ready(agent, self.state.round + off, weight_class))

    @rule(agent=agents, off=rounds_off, reason=reasons)
    def decline(self, agent: str, off: int, reason: Reason) -> None:
        self.post(Declined(agent, self.state.round + off, reason))

    @rule(agent=agents, off=rounds_off, digest=st.sampled_from([SHA, bytes([1]) * 32]))
    def apply(self, agent: str, off: int, digest: bytes) -> None:
        self.post(Applied(agent, self.state.round + off, digest))

    @rule(agent=agents, recipients=st.frozensets(agents | st.just("nobody")))
    def share_key(self, agent: str, recipients: frozenset[str]) -> None:
        if agent == self.state.key_asked and not self.state.phase.over:
            self.record.envelopes |= recipients  # as the conductor stores them, before the event
        self.post(KeyShared(agent, 1, dict.fromkeys(recipients, b"")))

    @rule(agent=agents, minute=st.binary(min_size=1, max_size=1))
    @precondition(lambda self: self.state.phase is Phase.COLLECTING)
    def upload(self, agent: str, minute: bytes) -> None:
        assume(agent in self.state.cohort)
        repeated = self.state.uploaded.get(agent)  # another update of the same agent is refused
        self.post(Uploaded(agent, repeated or minute * 32))

    @rule(data=st.data())
    @precondition(lambda self: not self.state.phase.over)
    def obey(self, data: st.DataObject) -> None:
        """Let somebody do what the run waits for, so that runs get far."""
        wanted = wanted_events(self.state)
        assume(wanted)
        event = data.draw(st.sampled_from(wanted))
        if isinstance(event, KeyShared):
            self.share_key(event.agent, frozenset(event.envelopes))
        elif isinstance(event, SumStored):
            self.store_sum()
        else:
            self.post(event)

    # the conductor

    @rule()
    @precondition(lambda self: self.state.phase is Phase.SUMMING)
    def store_sum(self) -> None:
        assert self.record.stored == self.state.round - 1
        self.record.stored += 1
        self.post(SumStored())

    @rule()
    @precondition(lambda self: self.state.phase is Phase.SUMMING)
    def fail_sum(self) -> None:
        self.post(SumFailed())

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 61.0, 100.0, 301.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.post(Tick())

    @rule()
    @precondition(lambda self: not self.state.phase.over)
    def crash(self) -> None:
        """Continue with what a store keeps; see `Execution`."""
        old, number = self.state, self.record.stored + 1
        assume(number <= old.policy.rounds)  # otherwise the run is complete
        self.state = RunState(
            old.policy,
            self.now + old.policy.gathering_seconds,
            round=number,
            attempt=old.attempt if old.round == number else 0,
            key_holders=frozenset(self.record.envelopes),
        )
        if number > old.round:
            self.record.closed.add(old.round)

    # laws

    @invariant()
    def updates_are_of_members(self) -> None:
        state = self.state
        assert set(state.uploaded) <= set(state.cohort)
        assert len(set(state.cohort)) == len(state.cohort) <= state.policy.cohort_size
        assert set(state.cohort) <= state.invited

    @invariant()
    def an_end_has_its_reason(self) -> None:
        state = self.state
        assert (state.phase is Phase.FAILED) == (state.reason is not None)
        assert self.record.finished == state.phase.over
        assert state.phase is not Phase.COMPLETED or state.round == state.policy.rounds
        assert state.failures < MAX_ROUND_FAILURES
        assert 1 <= state.round <= state.policy.rounds

    def teardown(self) -> None:
        if hasattr(self, "state"):
            assert run_to_the_end(self.state, self.now, silence).phase.over
            assert run_to_the_end(self.state, self.now, good_will).phase in (
                Phase.COMPLETED,
                self.state.phase,
            )


def wanted_events(state: RunState) -> list[Event]:
    """What would move the run on now, from everybody who can."""
    number = state.round
    match state.phase:
        case Phase.GATHERING if state.key_asked is not None:
            return [KeyShared(state.key_asked, 1, dict.fromkeys(state.key_recipients, b""))]
        case Phase.GATHERING:
            here = state.connected - set(state.excluded)
            return [AgentConnected(agent) for agent in AGENTS if agent not in here]
        case Phase.TRAINING:
            return [Ready(a, number, 3) for a in sorted(state.invited) if a not in state.ready]
        case Phase.COLLECTING:
            return [Uploaded(a, SHA) for a in state.cohort if a not in state.uploaded]
        case Phase.SUMMING:
            return [SumStored()]
        case Phase.APPLYING:
            return [Applied(a, number, SHA) for a in sorted(state.invited - set(state.applied))]
        case Phase.COMPLETED | Phase.FAILED:
            return []


def silence(state: RunState) -> Event:
    """Nobody says anything; only a sum that was begun is stored."""
    return SumStored() if state.phase is Phase.SUMMING else Tick()


def good_will(state: RunState) -> Event:
    """Everybody comes back and does what the run waits for."""
    absent = [a for a in AGENTS if a not in state.connected or a in state.excluded]
    events = [AgentConnected(absent[0])] if absent else wanted_events(state)
    return events[0] if events else Tick()


def run_to_the_end(state: RunState, now: float, behaviour: Callable[[RunState], Event]) -> RunState:
    """Go on by one behaviour; time passes only where it is waited for."""
    for _ in range(MAX_EVENTS_TO_THE_END):
        if state.phase.over:
            break
        event = behaviour(state)
        now += FOREVER if isinstance(event, Tick) else 0.0
        state, _effects = handle(state, event, now)
    return state


TestOrderings = Orderings.TestCase
TestOrderings.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
