"""The state machine under any order of events: agents come, go, lie and repeat, and time passes.

The conductor's part is played honestly: an update counts once, a closed sum is stored or fails, a
crash forgets all but the journal, whose replay must give the very state. The agents' part is not.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
    AgentRemoved,
    Applied,
    CloseRound,
    Declined,
    Effect,
    Event,
    FinishRun,
    Invite,
    KeyShared,
    Ready,
    Reject,
    SumFailed,
    SumReturned,
    SumStored,
    TakenUp,
    Tick,
    Uploaded,
    Wished,
)
from coordinator.journal import Journal, MaskMessage
from coordinator.rounds import MAX_ROUND_FAILURES, handle
from coordinator.run_state import Phase, RunPolicy, RunState, Wish
from coordinator.selection import UNIFORM, UNKNOWN, Selection, SelectionRule, Traits, eligible
from coordinator.store import JournalEntry, Store
from fedloom.errors import Reason
from tests.coordinator.record import Record

AGENTS = "abcde"
SHA = bytes(32)
FOREVER = 10_000.0  # longer than every deadline
MAX_EVENTS_TO_THE_END = 500

agents = st.sampled_from(AGENTS)
reasons = st.sampled_from([Reason.TRAINING_FAILED, Reason.KEY_UNAVAILABLE, Reason.INTERNAL])
rounds_off = st.sampled_from([0, 0, 0, -1, 1])


def _is_possible(policy: RunPolicy) -> bool:
    """As `coordinator.config` checks."""
    if policy.buffer and not policy.minimum_agents <= policy.buffer <= policy.cohort_size:
        return False
    quorum = policy.quorum == 0 or policy.minimum_agents <= policy.quorum <= policy.cohort_size
    return quorum and (policy.minimum_agents > 1 or not policy.returns_sums)


SELECTIONS = (
    UNIFORM,
    Selection(over_selection=1.5),
    Selection(most_rounds=1, window=2),
    Selection(SelectionRule.CAPABILITY, 1.3, 2, 3, round_seconds=20.0, least_memory_mb=1),
)
TRAITS = (
    UNKNOWN,
    Traits(memory_bytes=1 << 30, training_seconds=50.0, engines=("onnx",)),
    Traits(memory_bytes=1 << 30, available_until=120.0),
)
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
    has_masks=st.booleans(),
    quorum=st.sampled_from([0, 0, 2, 3]),
    returns_sums=st.booleans(),
    selection=st.sampled_from(SELECTIONS),
    buffer=st.just(0),
    max_staleness=st.just(0),
).filter(_is_possible)
asynchronous_policies = st.builds(
    replace,
    policies,
    quorum=st.just(0),
    selection=st.sampled_from([UNIFORM, Selection(least_memory_mb=1)]),
    buffer=st.integers(1, 5),
    max_staleness=st.integers(0, 2),
).filter(_is_possible)


class JournalStore:
    """Keeps one run's journal in memory."""

    def __init__(self) -> None:
        self.entries: list[JournalEntry] = []

    def append_journal(self, run_id: bytes, entry: JournalEntry) -> None:
        self.entries.append(entry)

    def restart_journal(self, run_id: bytes, first: JournalEntry | None) -> None:
        self.entries = [] if first is None else [first]

    def journal(self, run_id: bytes) -> list[JournalEntry]:
        return self.entries


class Orderings(RuleBasedStateMachine):
    """Any agent at any time; see the rules."""

    @initialize(policy=policies)
    def open(self, policy: RunPolicy) -> None:
        self.now = 0.0
        self.record = Record()
        self.invited: list[frozenset[str]] = []  # by the finished rounds
        self.state = RunState(policy, deadline=policy.gathering_seconds)
        self.store = JournalStore()
        self.journal = Journal(cast(Store, self.store), bytes(16))
        self.journal.restart(0.0, self.state)

    def post(self, event: Event) -> None:
        before = self.state
        self.state, effects = handle(before, event, self.now)
        if self.state is not before or effects:
            self.journal.append(self.now, event)
        self.check_step(before, event, effects)
        if CloseRound() in effects:
            self.invited.append(before.invited)
            self.journal.restart(self.now, self.state)
        for effect in effects:
            self.record.keep(before, self.state, effect)

    def check_step(self, before: RunState, event: Event, effects: tuple[Effect, ...]) -> None:
        after = self.state
        assert after.round - before.round in (0, 1)
        void = before.policy.has_masks and isinstance(event, SumFailed)
        assert (after.round > before.round) <= (CloseRound() in effects or void)
        assert (after.attempt >= before.attempt) or after.round > before.round
        assert (after.phase.over and not before.phase.over) == (FinishRun() in effects)
        if before.phase.over:
            assert (after.phase, after.round, after.reason) == (
                before.phase,
                before.round,
                before.reason,
            )
            assert all(isinstance(effect, Reject) for effect in effects)

    # agents

    @rule(agent=agents, traits=st.sampled_from(TRAITS))
    def connect(self, agent: str, traits: Traits) -> None:
        self.post(AgentConnected(agent, traits))

    @rule(agent=agents)
    def disconnect(self, agent: str) -> None:
        self.post(AgentDisconnected(agent))

    @rule(
        agent=agents,
        off=rounds_off,
        weight_class=st.integers(0, 24),
        staleness=st.sampled_from([0, 0, 0, 1, 2, 3, -1]),
    )
    def ready(self, agent: str, off: int, weight_class: int, staleness: int) -> None:
        base = max(0, self.state.completed - staleness)
        number = self.state.round + off
        self.post(Ready(agent, number, weight_class, base_rounds=base))

    @rule(agent=agents, off=rounds_off, reason=reasons)
    def decline(self, agent: str, off: int, reason: Reason) -> None:
        self.post(Declined(agent, self.state.round + off, reason))

    @rule(agent=agents, off=rounds_off, digest=st.sampled_from([SHA, bytes([1]) * 32]))
    def apply(self, agent: str, off: int, digest: bytes) -> None:
        self.post(Applied(agent, self.state.round + off, digest))

    @rule(agent=agents, recipients=st.frozensets(agents | st.just("nobody")), off=rounds_off)
    def share_key(self, agent: str, recipients: frozenset[str], off: int) -> None:
        grant = self.state.grant
        key_id = off if grant is None else grant.key_id + off
        if grant is not None and (agent, key_id) == (grant.holder, grant.key_id):
            # as the conductor stores them, before the event
            self.record.envelopes[key_id] |= recipients & grant.recipients
        self.post(KeyShared(agent, key_id, dict.fromkeys(recipients, b"")))

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
            self.share_key(event.agent, frozenset(event.envelopes), 0)
        elif isinstance(event, SumStored):
            self.store_sum()
        else:
            self.post(event)

    # the conductor

    @rule()
    @precondition(lambda self: self.state.phase is Phase.SUMMING)
    def store_sum(self) -> None:
        assert self.record.stored == self.state.previous_round
        self.record.stored = self.state.round
        if self.state.policy.needs_key:
            self.record.used_keys.add(self.state.keys.latest)
        self.post(SumStored())

    @rule()
    @precondition(lambda self: self.state.phase is Phase.RETURNING and self.state.returning)
    def return_sum(self) -> None:
        self.post(SumReturned(self.state.returning))

    @rule(agent=agents)
    def ban(self, agent: str) -> None:
        self.post(AgentRemoved(agent))

    @rule(wish=st.sampled_from([Wish.RUN, Wish.RUN, Wish.PAUSE]))
    def wish(self, wish: Wish) -> None:
        self.post(Wished(wish))

    @rule()
    @precondition(lambda self: self.state.phase is Phase.SUMMING)
    def fail_sum(self) -> None:
        self.post(SumFailed())

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 61.0, 100.0, 301.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.post(Tick())

    @rule(here=st.frozensets(agents))
    @precondition(lambda self: not self.state.phase.over)
    def crash(self, here: frozenset[str]) -> None:
        """Continue with what the journal keeps; see `Execution.open`."""
        old, replayed = self.state, None
        for at, happened in self.journal.read():
            if isinstance(happened, RunState):
                replayed = happened
            else:
                assert not isinstance(happened, MaskMessage)
                assert replayed is not None
                replayed, _ = handle(replayed, happened, at)
        assert replayed == old
        self.state = replayed
        self.post(TakenUp(here))

    # laws

    @invariant()
    def updates_are_of_members(self) -> None:
        state = self.state
        assert set(state.uploaded) <= set(state.cohort)
        assert len(set(state.cohort)) == len(state.cohort) <= state.policy.cohort_size
        assert set(state.cohort) <= state.invited
        policy = state.policy
        most = policy.selection.invitations(policy.cohort_size)
        assert policy.is_asynchronous or len(state.invited) <= most
        assert set(state.traits) <= state.connected

    @invariant()
    def nobody_is_invited_more_often_than_the_cap_allows(self) -> None:
        cap, window = self.state.policy.selection.most_rounds, self.state.policy.selection.window
        for agent in AGENTS if cap else ():
            open_round = () if self.state.phase.over else (self.state.invited,)
            rounds = [agent in invited for invited in (*self.invited, *open_round)]
            assert sum(rounds[-window:]) <= cap

    @invariant()
    def an_end_has_its_reason(self) -> None:
        state = self.state
        assert (state.phase is Phase.FAILED) == (state.reason is not None)
        assert self.record.finished == state.phase.over
        assert (state.phase is Phase.COMPLETED) == (state.completed == state.policy.rounds)
        assert state.failures < MAX_ROUND_FAILURES or state.reason is Reason.QUORUM_NOT_REACHED
        assert state.completed <= state.round
        assert state.previous_round <= state.round

    def teardown(self) -> None:
        if hasattr(self, "state"):
            assert run_to_the_end(self.state, self.now, silence).phase.over
            if self.state.policy.selection in (UNIFORM, Selection(over_selection=1.5)):
                assert run_to_the_end(self.state, self.now, good_will).phase in (
                    Phase.COMPLETED,
                    self.state.phase,
                )


def wanted_events(state: RunState) -> list[Event]:
    """What would move the run on now, from everybody who can."""
    number = state.round
    match state.phase:
        case Phase.GATHERING if state.paused:
            return [Wished(Wish.RUN)]
        case Phase.GATHERING if state.grant is not None:
            grant = state.grant
            envelopes = dict.fromkeys(grant.recipients, b"")
            return [KeyShared(grant.holder, grant.key_id, envelopes)]
        case Phase.GATHERING:
            return [AgentConnected(agent) for agent in AGENTS if agent not in state.candidates]
        case Phase.TRAINING:
            base = state.completed if state.policy.is_asynchronous else 0
            missing = [agent for agent in sorted(state.invited) if agent not in state.ready]
            return [Ready(agent, number, 3, base_rounds=base) for agent in missing]
        case Phase.COLLECTING:
            return [Uploaded(a, SHA) for a in state.cohort if a not in state.uploaded]
        case Phase.SUMMING:
            return [SumStored()]
        case Phase.APPLYING:
            return [Applied(a, number, SHA) for a in sorted(state.appliers - set(state.applied))]
        case Phase.RETURNING:
            return [SumReturned(state.returning)] if state.returning else []
        case Phase.COMPLETED | Phase.FAILED:
            return []


def silence(state: RunState) -> Event:
    """Nobody says anything; only a sum that was begun is stored."""
    if state.paused:
        return Wished(Wish.RUN)
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


class AsynchronousOrderings(Orderings):
    """The same, where a round is for whoever is ready first."""

    @initialize(policy=asynchronous_policies)
    def open(self, policy: RunPolicy) -> None:
        super().open(policy)

    def check_step(self, before: RunState, event: Event, effects: tuple[Effect, ...]) -> None:
        super().check_step(before, event, effects)
        refused = any(isinstance(effect, Reject) for effect in effects)
        if isinstance(event, Ready) and not before.phase.over and refused:
            # Politely: only what can never fit is refused, and who trained in vain is asked again.
            assert before.phase is Phase.TRAINING
            assert event.round == before.round
            staleness = before.completed - event.base_rounds
            too_old = not 0 <= staleness <= before.policy.max_staleness
            assert too_old or event.agent not in before.invited
            asked = Invite(frozenset({event.agent})) in effects
            assert asked == (too_old and event.agent in before.invited - set(before.ready))

    @invariant()
    def cohorts_are_small_and_fresh(self) -> None:
        state = self.state
        assert len(state.cohort) <= state.policy.buffer
        assert set(state.ready) <= set(state.staleness)
        for agent in {*state.ready, *state.cohort}:
            assert 0 <= state.staleness[agent] <= state.policy.max_staleness

    @invariant()
    def who_is_here_is_asked(self) -> None:
        """Nobody waits for a round that went on without it."""
        state = self.state
        if state.phase is Phase.TRAINING:
            selection = state.policy.selection
            able = eligible(selection, state.candidates, state.traits, state.recent, self.now)
            if state.policy.needs_key:
                able = state.keys.able(able, state.past_keys)
            assert able <= state.invited
            here = state.connected & state.invited - set(state.excluded)
            enough = len(set(state.ready) & here) >= state.policy.minimum_agents
            assert not (enough and here <= set(state.ready))


TestOrderings = Orderings.TestCase
TestOrderings.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAsynchronousOrderings = AsynchronousOrderings.TestCase
TestAsynchronousOrderings.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None
)
