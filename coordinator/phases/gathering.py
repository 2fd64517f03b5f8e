"""GATHERING: agents arrive, the run keys are shared, a round starts; and how it starts again."""

from collections.abc import Mapping
from dataclasses import replace

from coordinator.events import (
    AbandonRound,
    AgentConnected,
    AgentDisconnected,
    Declined,
    Effect,
    FinishRun,
    Invite,
    KeyShared,
    Reject,
    ShareKey,
    Tick,
)
from coordinator.run_state import Phase, RunState
from coordinator.selection import UNKNOWN, Traits, choose, eligible
from fedloom.errors import Reason

MAX_ROUND_FAILURES = 3
KEY_SECONDS = 60.0  # an agent that has not wrapped the run key by then is passed over
# What the next round will not change; an agent that declined for another reason gets a new chance.
_LASTING = {
    Reason.PROTECTION_TOO_WEAK,
    Reason.PLAN_MISMATCH,
    Reason.PLAN_UNSUPPORTED,
    Reason.DATA_UNREADABLE,
    Reason.DATA_COLUMN_MISSING,
    Reason.DATA_LABEL_UNKNOWN,
    Reason.DATA_EMPTY,
    Reason.BANNED,
}

Step = tuple[RunState, tuple[Effect, ...]]


def admit(state: RunState, agent: str, said: Traits) -> RunState:
    """Count an agent in, whatever it declined before it connected again."""
    excluded = {name: reason for name, reason in state.excluded.items() if name != agent}
    return replace(
        state,
        connected=state.connected | {agent},
        excluded=excluded,
        traits=_with(state.traits, agent, said),
    )


def leave(state: RunState, agent: str) -> RunState:
    """Count an agent out."""
    left = state.connected - {agent}
    return replace(state, connected=left, traits=_with(state.traits, agent, UNKNOWN))


def _with(traits: Mapping[str, Traits], agent: str, said: Traits) -> Mapping[str, Traits]:
    """Return the traits after what one agent said; who said nothing takes no room."""
    if traits.get(agent, UNKNOWN) == said:
        return traits
    if said != UNKNOWN:
        return {**traits, agent: said}
    return {name: known for name, known in traits.items() if name != agent}


def learn(state: RunState, agent: str, training_seconds: float) -> RunState:
    """Remember how long an agent's training took, for as long as it is here."""
    if training_seconds <= 0 or agent not in state.connected:
        return state
    said = replace(state.traits.get(agent, UNKNOWN), training_seconds=training_seconds)
    return replace(state, traits=_with(state.traits, agent, said))


def exclude(state: RunState, agent: str, reason: Reason) -> RunState:
    """Wait for an agent no more, and choose it no more while the reason lasts."""
    excluded = replace(state, excluded={**state.excluded, agent: reason})
    if reason is Reason.KEY_SPENT:
        return replace(excluded, keys=replace(state.keys, stale=True))
    return excluded


def wrong_round(state: RunState, agent: str) -> Step:
    """Refuse a step that does not fit, and change nothing."""
    subject = f"expected a step of round {state.round}, {state.phase.value}"
    return state, (Reject(agent, Reason.WRONG_ROUND, subject),)


def fail(state: RunState, reason: Reason) -> Step:
    """End the run without success."""
    return replace(state, phase=Phase.FAILED, reason=reason), (FinishRun(),)


def start_gathering(state: RunState, now: float) -> Step:
    """Begin a round, or begin it again: whoever declined for a passing reason may come back."""
    gathering = replace(
        state,
        phase=Phase.GATHERING,
        deadline=now + state.policy.gathering_seconds,
        excluded=_only_lasting(state.excluded),
        invited=frozenset(),
        cohort=(),
        uploaded={},
        agreed=None,
        returning="",
        returners=(),
    )
    return gather(gathering, now)


def try_round_again(state: RunState, now: float) -> Step:
    """Too few updates: form another cohort, or give up after MAX_ROUND_FAILURES."""
    return _after_failure(state, now)


def void_round(state: RunState, now: float) -> Step:
    """Go on under the next number: members that vouched for a sum give this round no second one."""
    return _after_failure(replace(state, round=state.round + 1, attempt=0), now)


def _after_failure(state: RunState, now: float) -> Step:
    failures = state.failures + 1
    failed = replace(state, failures=failures)
    if failures >= MAX_ROUND_FAILURES:
        after, effects = fail(failed, Reason.QUORUM_NOT_REACHED)
    else:
        after, effects = start_gathering(failed, now)
    return after, (AbandonRound(), *effects)


def _only_lasting(excluded: Mapping[str, Reason]) -> dict[str, Reason]:
    return {agent: reason for agent, reason in excluded.items() if reason in _LASTING}


def gather(state: RunState, now: float) -> Step:
    """Start the round when enough agents are here and all of them hold the run's keys."""
    candidates, policy = state.candidates, state.policy
    if state.paused or len(candidates) < policy.minimum_agents:
        return state, ()
    if policy.needs_key and state.grant is not None and state.grant.holder in candidates:
        return state, ()
    may = eligible(policy.selection, candidates, state.traits, state.recent, now)
    if len(may) < policy.minimum_agents:
        return state, ()
    if policy.needs_key:
        # Of all who are here: one that may not be invited now may hold what the others lack.
        grant = state.keys.next_grant(candidates, state.past_keys)
        if grant is not None:
            keys = state.keys.asked(grant)
            asked = replace(state, keys=keys, grant=grant, grant_deadline=now + KEY_SECONDS)
            return asked, (ShareKey(grant),)
        may &= state.keys.able(candidates, state.past_keys)
        if len(may) < policy.minimum_agents:
            return state, ()  # wait for an agent that holds the keys of the rounds so far
    chosen = may  # asynchronous: whoever is here and may; who trains goes on
    if not policy.is_asynchronous:
        draw = f"{policy.seed}/{state.round}/{state.failures}"  # another try, other agents
        chosen = choose(policy.selection, may, state.traits, policy.cohort_size, draw)
    training = replace(
        state,
        phase=Phase.TRAINING,
        deadline=now + state.policy.training_seconds,
        invited=chosen,
        ready={},
        staleness={},
        grant=None,
        began=now,
    )
    return training, (Invite(chosen),)


def connected(state: RunState, event: AgentConnected, now: float) -> Step:
    """An agent more to choose from."""
    return gather(admit(state, event.agent, event.traits), now)


def disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    """One fewer; who should have wrapped a key will not."""
    gone = state.grant is not None and state.grant.holder == event.agent
    left = leave(state, event.agent)
    return gather(replace(left, grant=None if gone else state.grant), now)


def key_shared(state: RunState, event: KeyShared, now: float) -> Step:
    """Who was to be given the key and was not is passed over: its own key did not verify."""
    grant = state.grant
    if grant is None or (event.agent, event.key_id) != (grant.holder, grant.key_id):
        return state, ()
    recipients = frozenset(event.envelopes)
    shared = replace(state, keys=state.keys.granted(grant, recipients), grant=None)
    for agent in grant.recipients - recipients:
        shared = exclude(shared, agent, Reason.KEY_UNAVAILABLE)
    return gather(shared, now)


def declined(state: RunState, event: Declined, now: float) -> Step:
    """The agent that was asked cannot wrap the key."""
    if event.round and not state.takes(event.round):
        return state, ()  # its training for an earlier round
    if state.grant is None or event.agent != state.grant.holder:
        return wrong_round(state, event.agent)
    return gather(replace(exclude(state, event.agent, event.reason), grant=None), now)


def tick(state: RunState, event: Tick, now: float) -> Step:
    """Give up at the deadline, unless the operator has the run wait."""
    if now >= state.deadline and not state.paused:
        return fail(state, Reason.QUORUM_NOT_REACHED)
    if state.grant is not None and now >= state.grant_deadline:
        passed_over = exclude(state, state.grant.holder, Reason.KEY_UNAVAILABLE)
        return gather(replace(passed_over, grant=None), now)
    return state, ()
