"""A run as a state machine: events in, new state and effects out. No I/O, no clock.

    GATHERING ──enough agents, all hold the run key──▶ TRAINING ──all ready, or deadline──┐
        ▲  ▲                                              │                               ▼
        │  └──────────────── too few updates ─────────────┴────────────────────────── COLLECTING
        │                                                                                 │
        └──next round── APPLYING ◀──sum stored── SUMMING ◀──all uploaded, or deadline─────┘

A run ends COMPLETED after its last round, or FAILED with a reason. An agent's message that does not
fit the state is answered with a `Reject` and changes nothing; an event of ours that does not fit is
a bug and raises `IllegalEvent`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from coordinator.events import (
    AbandonRound,
    AgentConnected,
    AgentDisconnected,
    Applied,
    CloseCohort,
    CloseRound,
    Declined,
    Effect,
    Event,
    FinishRun,
    Invite,
    KeyShared,
    OpenCohort,
    PublishResult,
    Ready,
    Reject,
    RepeatCohort,
    ShareKey,
    SumFailed,
    SumStored,
    Tick,
    Uploaded,
)
from coordinator.run_state import Phase, RunState
from coordinator.selection import select
from fedloom.errors import Reason

MAX_ROUND_FAILURES = 3
# What the next round will not change; an agent that declined for another reason gets a new chance.
_LASTING = {
    Reason.PROTECTION_TOO_WEAK,
    Reason.PLAN_MISMATCH,
    Reason.PLAN_UNSUPPORTED,
    Reason.DATA_UNREADABLE,
    Reason.DATA_COLUMN_MISSING,
    Reason.DATA_LABEL_UNKNOWN,
    Reason.DATA_EMPTY,
}
KEY_SECONDS = 60.0  # an agent that has not wrapped the run key by then is passed over


class IllegalEvent(Exception):
    """Our own code sent an event that the state does not allow."""


Step = tuple[RunState, tuple[Effect, ...]]


def handle(state: RunState, event: Event, now: float) -> Step:
    """Return the state after `event` and what must be done; `now` in seconds of a steady clock."""
    handler = _TRANSITIONS.get((state.phase, type(event)))
    if handler is not None:
        return handler(state, event, now)
    match event:
        case AgentConnected():
            return _admit(state, event.agent), ()
        case AgentDisconnected():
            return replace(state, connected=state.connected - {event.agent}), ()
        case Tick() | KeyShared():
            return state, ()
        case Ready() | Declined() | Applied():
            return _wrong_round(state, event.agent)
        case Uploaded() | SumStored() | SumFailed():
            raise IllegalEvent(f"expected no {type(event).__name__} while {state.phase.value}")


def _admit(state: RunState, agent: str) -> RunState:
    excluded = {name: reason for name, reason in state.excluded.items() if name != agent}
    return replace(state, connected=state.connected | {agent}, excluded=excluded)


def _exclude(state: RunState, agent: str, reason: Reason) -> RunState:
    return replace(state, excluded={**state.excluded, agent: reason})


def _only_lasting(excluded: Mapping[str, Reason]) -> dict[str, Reason]:
    return {agent: reason for agent, reason in excluded.items() if reason in _LASTING}


def _wrong_round(state: RunState, agent: str) -> Step:
    subject = f"expected a step of round {state.round}, {state.phase.value}"
    return state, (Reject(agent, Reason.WRONG_ROUND, subject),)


def _fail(state: RunState, reason: Reason) -> Step:
    return replace(state, phase=Phase.FAILED, reason=reason), (FinishRun(),)


def _try_round_again(state: RunState, now: float) -> Step:
    """Too few updates: gather again, or give up after MAX_ROUND_FAILURES."""
    failures = state.failures + 1
    if failures >= MAX_ROUND_FAILURES:
        failed, effects = _fail(state, Reason.QUORUM_NOT_REACHED)
        return failed, (AbandonRound(), *effects)
    again = replace(
        state,
        phase=Phase.GATHERING,
        deadline=now + state.policy.gathering_seconds,
        failures=failures,
        excluded=_only_lasting(state.excluded),
        invited=frozenset(),
        cohort=(),
        uploaded={},
    )
    gathered, effects = _gather(again, now)
    return gathered, (AbandonRound(), *effects)


# GATHERING


def _gather(state: RunState, now: float) -> Step:
    """Start the round when enough agents are here and all of them hold the run key."""
    candidates = state.connected - set(state.excluded)
    if len(candidates) < state.policy.minimum_agents:
        return state, ()
    draw = f"{state.policy.seed}/{state.round}/{state.failures}"  # another try, other agents
    chosen = select(candidates, state.policy.cohort_size, draw)
    if state.policy.needs_key and not chosen <= state.key_holders:
        return _ask_for_key(state, candidates, now)
    training = replace(
        state,
        phase=Phase.TRAINING,
        deadline=now + state.policy.training_seconds,
        invited=chosen,
        ready={},
        key_asked=None,
    )
    return training, (Invite(chosen),)


def _ask_for_key(state: RunState, candidates: frozenset[str], now: float) -> Step:
    if state.key_asked in candidates:
        return state, ()
    holders = candidates & state.key_holders
    if not holders and state.round > 1:
        return state, ()  # a new key could not open the sums so far: wait for an agent that has it
    holder = min(holders or candidates)
    recipients = candidates - holders
    asked = replace(
        state, key_asked=holder, key_recipients=recipients, key_deadline=now + KEY_SECONDS
    )
    if not holders:
        asked = replace(asked, key_holders=frozenset())
    return asked, (ShareKey(holder, recipients, fresh=not holders),)


def _gathering_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    return _gather(_admit(state, event.agent), now)


def _gathering_disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    asked = None if state.key_asked == event.agent else state.key_asked
    remaining = state.connected - {event.agent}
    return _gather(replace(state, connected=remaining, key_asked=asked), now)


def _gathering_key_shared(state: RunState, event: KeyShared, now: float) -> Step:
    if event.agent != state.key_asked:
        return state, ()
    holders = state.key_holders | set(event.envelopes)
    for agent in state.key_recipients - set(event.envelopes):
        state = _exclude(state, agent, Reason.KEY_UNAVAILABLE)  # its key did not verify
    return _gather(replace(state, key_holders=holders, key_asked=None), now)


def _gathering_declined(state: RunState, event: Declined, now: float) -> Step:
    if event.agent != state.key_asked:
        return _wrong_round(state, event.agent)
    return _gather(replace(_exclude(state, event.agent, event.reason), key_asked=None), now)


def _gathering_tick(state: RunState, event: Tick, now: float) -> Step:
    if now >= state.deadline:
        return _fail(state, Reason.QUORUM_NOT_REACHED)
    if state.key_asked is not None and now >= state.key_deadline:
        passed_over = _exclude(state, state.key_asked, Reason.KEY_UNAVAILABLE)
        return _gather(replace(passed_over, key_asked=None), now)
    return state, ()


# TRAINING


def _training_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    again = event.agent in state.invited and event.agent not in state.ready
    effects = (Invite(frozenset({event.agent})),) if again else ()
    return _admit(state, event.agent), effects


def _training_ready(state: RunState, event: Ready, now: float) -> Step:
    if event.round != state.round or event.agent not in state.invited:
        return _wrong_round(state, event.agent)
    ready = {**state.ready, event.agent: event.weight_class}
    return _form_cohort_when_all_answered(replace(state, ready=ready), now)


def _training_declined(state: RunState, event: Declined, now: float) -> Step:
    if event.round != state.round or event.agent not in state.invited:
        return _wrong_round(state, event.agent)
    return _form_cohort_when_all_answered(_exclude(state, event.agent, event.reason), now)


def _form_cohort_when_all_answered(state: RunState, now: float) -> Step:
    if state.invited - set(state.excluded) <= set(state.ready):
        return _form_cohort(state, now)
    return state, ()


def _training_tick(state: RunState, event: Tick, now: float) -> Step:
    return _form_cohort(state, now) if now >= state.deadline else (state, ())


def _form_cohort(state: RunState, now: float) -> Step:
    members = sorted(set(state.ready) - set(state.excluded))
    if len(members) < state.policy.minimum_agents:
        return _try_round_again(state, now)
    collecting = replace(
        state,
        phase=Phase.COLLECTING,
        deadline=now + state.policy.upload_seconds,
        attempt=state.attempt + 1,
        cohort=tuple(members),
        uploaded={},
    )
    return collecting, (OpenCohort(),)


# COLLECTING


def _collecting_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    admitted = _admit(state, event.agent)
    if event.agent not in state.cohort or event.agent in state.uploaded:
        return admitted, ()
    # The agent may have restarted and lost its update: the invitation lets it train again.
    return admitted, (Invite(frozenset({event.agent})), RepeatCohort(event.agent))


def _collecting_ready(state: RunState, event: Ready, now: float) -> Step:
    if event.round == state.round and event.agent in state.cohort:
        return state, ()  # it trained again after a restart; its weight class is fixed already
    subject = f"expected READY before the cohort of round {state.round} was formed"
    return state, (Reject(event.agent, Reason.DEADLINE_PASSED, subject),)


def _collecting_declined(state: RunState, event: Declined, now: float) -> Step:
    if event.round != state.round or event.agent not in state.cohort:
        return _wrong_round(state, event.agent)
    if event.agent in state.uploaded:
        return state, ()
    return _close_when_all_uploaded(_exclude(state, event.agent, event.reason), now)


def _collecting_uploaded(state: RunState, event: Uploaded, now: float) -> Step:
    if event.agent not in state.cohort:
        raise IllegalEvent(f"expected an upload of a member, found one of {event.agent}")
    uploaded = {**state.uploaded, event.agent: event.sha256}
    return _close_when_all_uploaded(replace(state, uploaded=uploaded), now)


def _close_when_all_uploaded(state: RunState, now: float) -> Step:
    missing = set(state.cohort) - set(state.excluded) - set(state.uploaded)
    return (state, ()) if missing else _close_cohort(state, now)


def _collecting_tick(state: RunState, event: Tick, now: float) -> Step:
    return _close_cohort(state, now) if now >= state.deadline else (state, ())


def _close_cohort(state: RunState, now: float) -> Step:
    if len(state.uploaded) < state.policy.minimum_agents:
        return _try_round_again(state, now)
    return replace(state, phase=Phase.SUMMING), (CloseCohort(),)


# SUMMING and APPLYING


def _summing_stored(state: RunState, event: SumStored, now: float) -> Step:
    applying = replace(
        state, phase=Phase.APPLYING, deadline=now + state.policy.applying_seconds, applied={}
    )
    return applying, (PublishResult(state.invited & state.connected),)


def _summing_failed(state: RunState, event: SumFailed, now: float) -> Step:
    return _try_round_again(state, now)


def _applying_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    again = event.agent in state.invited and event.agent not in state.applied
    effects = (PublishResult(frozenset({event.agent})),) if again else ()
    return _admit(state, event.agent), effects


def _applying_disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    gone = replace(state, connected=state.connected - {event.agent})
    return _close_round_when_all_applied(gone, now)


def _applying_applied(state: RunState, event: Applied, now: float) -> Step:
    if event.round != state.round or event.agent not in state.invited:
        return _wrong_round(state, event.agent)
    applied = {**state.applied, event.agent: event.state_sha256}
    return _close_round_when_all_applied(replace(state, applied=applied), now)


def _applying_declined(state: RunState, event: Declined, now: float) -> Step:
    if event.round != state.round or event.agent not in state.invited:
        return _wrong_round(state, event.agent)
    return _close_round_when_all_applied(_exclude(state, event.agent, event.reason), now)


def _close_round_when_all_applied(state: RunState, now: float) -> Step:
    missing = state.invited - set(state.excluded) - set(state.applied)
    # Those who are away are not waited for, unless nobody has applied: a cut ends no run.
    if missing & state.connected or (missing and not state.applied):
        return state, ()
    return _close_round(state, now)


def _applying_tick(state: RunState, event: Tick, now: float) -> Step:
    return _close_round(state, now) if now >= state.deadline else (state, ())


def _close_round(state: RunState, now: float) -> Step:
    """Go on with the agents whose state is the majority's; without any, the sum is of no use."""
    if not state.applied:
        reasons = Counter(state.excluded[a] for a in state.invited if a in state.excluded)
        cause = reasons.most_common(1)[0][0] if reasons else Reason.QUORUM_NOT_REACHED
        return _fail(state, cause)
    agreed = Counter(state.applied.values()).most_common(1)[0][0]
    diverged = sorted(agent for agent, digest in state.applied.items() if digest != agreed)
    rejects = tuple(
        Reject(agent, Reason.STATE_DIVERGED, f"expected state {agreed.hex()} after the round")
        for agent in diverged
    )
    if state.round == state.policy.rounds:
        completed = replace(state, phase=Phase.COMPLETED)
        return completed, (*rejects, CloseRound(), FinishRun())
    following = replace(
        state,
        phase=Phase.GATHERING,
        deadline=now + state.policy.gathering_seconds,
        round=state.round + 1,
        attempt=0,
        failures=0,
        excluded=_only_lasting(state.excluded),
        invited=frozenset(),
        cohort=(),
        uploaded={},
    )
    gathered, effects = _gather(following, now)
    return gathered, (*rejects, CloseRound(), *effects)


_TRANSITIONS: dict[tuple[Phase, type[Event]], Callable[..., Step]] = {
    (Phase.GATHERING, AgentConnected): _gathering_connected,
    (Phase.GATHERING, AgentDisconnected): _gathering_disconnected,
    (Phase.GATHERING, KeyShared): _gathering_key_shared,
    (Phase.GATHERING, Declined): _gathering_declined,
    (Phase.GATHERING, Tick): _gathering_tick,
    (Phase.TRAINING, AgentConnected): _training_connected,
    (Phase.TRAINING, Ready): _training_ready,
    (Phase.TRAINING, Declined): _training_declined,
    (Phase.TRAINING, Tick): _training_tick,
    (Phase.COLLECTING, AgentConnected): _collecting_connected,
    (Phase.COLLECTING, Ready): _collecting_ready,
    (Phase.COLLECTING, Declined): _collecting_declined,
    (Phase.COLLECTING, Uploaded): _collecting_uploaded,
    (Phase.COLLECTING, Tick): _collecting_tick,
    (Phase.SUMMING, SumStored): _summing_stored,
    (Phase.SUMMING, SumFailed): _summing_failed,
    (Phase.APPLYING, AgentConnected): _applying_connected,
    (Phase.APPLYING, AgentDisconnected): _applying_disconnected,
    (Phase.APPLYING, Applied): _applying_applied,
    (Phase.APPLYING, Declined): _applying_declined,
    (Phase.APPLYING, Tick): _applying_tick,
}
