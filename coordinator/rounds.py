"""A run as a state machine: events in, new state and effects out. No I/O, no clock.

    GATHERING ──enough agents, all hold the run key──▶ TRAINING ──all ready, quorum, deadline──┐
        ▲  ▲                                              │                                    ▼
        │  └──────────────── too few updates ─────────────┴──────────────────────────── COLLECTING
        │                                                                                      │
        └─next round─ (RETURNING ◀─) APPLYING ◀──sum stored── SUMMING ◀──all uploaded, deadline┘

An asynchronous run goes the same way: its rounds invite everybody who is here, and the first
`buffer` that are ready are its cohort, whichever round they began to train in. The others train on,
and answer the next invitation; the sum's members alone have to apply a round before it is over.

A round whose masks could not be taken out of its sum is void: the run goes on under the next
number. A run ends COMPLETED when enough rounds are history or its models get no better
(`coordinator.plateau`), or FAILED with a reason. An agent's
message that does not fit the state is answered with a `Reject` and changes nothing; an event of
ours that does not fit is a bug and raises `IllegalEvent`.
"""

from collections.abc import Callable
from dataclasses import replace

from coordinator.events import (
    AbandonRound,
    AgentConnected,
    AgentDisconnected,
    AgentRemoved,
    Applied,
    Declined,
    Event,
    Invite,
    KeyShared,
    PublishResult,
    Ready,
    RepeatCohort,
    SumFailed,
    SumReturned,
    SumStored,
    TakenUp,
    Tick,
    Uploaded,
    Wished,
)
from coordinator.phases import applying, collecting, gathering
from coordinator.phases.collecting import IllegalEvent
from coordinator.phases.gathering import KEY_SECONDS, MAX_ROUND_FAILURES, Step
from coordinator.run_state import Phase, RunState, Wish
from fedloom.errors import Reason

__all__ = ["KEY_SECONDS", "MAX_ROUND_FAILURES", "IllegalEvent", "handle"]


def handle(state: RunState, event: Event, now: float) -> Step:
    """Return the state after `event` and what must be done; `now` in seconds of a steady clock."""
    kind = type(event)
    handler = _TRANSITIONS.get((state.phase, kind)) or _OTHERWISE[kind]
    return handler(state, event, now)


def _connected(state: RunState, event: AgentConnected, now: float) -> Step:
    return gathering.admit(state, event.agent, event.traits), ()


def _disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    return gathering.leave(state, event.agent), ()


def _refuse(state: RunState, event: Ready | Declined | Applied, now: float) -> Step:
    if not state.takes(event.round):
        return state, ()
    return gathering.wrong_round(state, event.agent)


def _ignore(state: RunState, event: Event, now: float) -> Step:
    return state, ()


def _illegal(state: RunState, event: Event, now: float) -> Step:
    if state.phase.over:
        return state, ()  # the run was cancelled meanwhile
    raise IllegalEvent(f"expected no {type(event).__name__} while {state.phase.value}")


def _take_up(state: RunState, event: TakenUp, now: float) -> Step:
    """Go on with the agents that are here, and with all the time that the phase has.

    A coordinator that was away blames nobody; what was asked of agents is asked again.
    """
    policy, agents = state.policy, event.agents
    seconds = {
        Phase.GATHERING: policy.gathering_seconds,
        Phase.TRAINING: policy.training_seconds,
        Phase.APPLYING: policy.applying_seconds,
    }.get(state.phase, policy.upload_seconds)
    here = replace(
        state,
        deadline=now + seconds,
        connected=agents,
        excluded={name: why for name, why in state.excluded.items() if name not in agents},
        traits=event.traits,
        grant=None,
    )
    match state.phase:
        case Phase.GATHERING:
            return gathering.gather(here, now)
        case Phase.TRAINING:
            here = collecting.ready_and_here(collecting.invite_newcomers(here, agents, now))
            missing = (agents & here.invited) - set(here.ready)
            if not missing and state.policy.is_asynchronous:
                return collecting.form_cohort_when_enough(here, now)
            return here, (Invite(missing),) if missing else ()
        case Phase.COLLECTING:
            missing = (agents & set(state.cohort)) - set(state.uploaded)
            repeats = tuple(RepeatCohort(agent) for agent in sorted(missing))
            return here, (Invite(missing), *repeats) if missing else ()
        case Phase.APPLYING:
            missing = (agents & here.appliers) - set(state.applied)
            return here, (PublishResult(missing),) if missing else ()
        case Phase.RETURNING:
            return applying.ask_next(here, now)
        case _:
            return here, ()


def _remove(state: RunState, event: AgentRemoved, now: float) -> Step:
    """Go on without a banned agent, and under a key that it was never given."""
    agent = event.agent
    if state.phase.over:
        return state, ()
    had_key = any(agent in holders for holders in state.keys.holders.values())
    offered = state.grant is not None and agent in state.grant.recipients
    left = replace(
        gathering.leave(state, agent),
        keys=replace(state.keys, stale=state.keys.stale or had_key),
        grant=None if offered else state.grant,  # an answer to it is not taken any more
    )
    removed = gathering.exclude(left, agent, Reason.BANNED)
    declined = Declined(agent, state.round, Reason.BANNED)
    match state.phase:
        case Phase.GATHERING:
            return gathering.disconnected(removed, AgentDisconnected(agent), now)
        case Phase.TRAINING if agent in state.invited:
            return collecting.training_declined(removed, declined, now)
        case Phase.COLLECTING if agent in state.cohort and agent not in state.uploaded:
            return collecting.close_when_all_uploaded(removed, now)
        case Phase.APPLYING:
            return applying.go_on_without(state, removed, now)
        case Phase.RETURNING if agent == state.returning:
            return applying.returning_declined(removed, declined, now)
        case _:
            return removed, ()


def _obey(state: RunState, event: Wished, now: float) -> Step:
    """Do what the operator wants; a round that has begun is finished before a pause."""
    wish = event.wish
    if state.phase.over:
        return state, ()
    if wish is Wish.CANCEL:
        cancelled, effects = gathering.fail(state, Reason.RUN_CANCELLED)
        return cancelled, (AbandonRound(), *effects)
    paused = wish is Wish.PAUSE
    if paused == state.paused:
        return state, ()
    obeyed = replace(state, paused=paused)
    if state.phase is Phase.GATHERING and not paused:
        return gathering.start_gathering(obeyed, now)
    return obeyed, ()


_TRANSITIONS: dict[tuple[Phase, type[Event]], Callable[..., Step]] = {
    (Phase.GATHERING, AgentConnected): gathering.connected,
    (Phase.GATHERING, AgentDisconnected): gathering.disconnected,
    (Phase.GATHERING, KeyShared): gathering.key_shared,
    (Phase.GATHERING, Declined): gathering.declined,
    (Phase.GATHERING, Tick): gathering.tick,
    (Phase.TRAINING, AgentConnected): collecting.invited_connected,
    (Phase.TRAINING, AgentDisconnected): collecting.invited_disconnected,
    (Phase.TRAINING, Ready): collecting.ready,
    (Phase.TRAINING, Declined): collecting.training_declined,
    (Phase.TRAINING, Tick): collecting.training_tick,
    (Phase.COLLECTING, AgentConnected): collecting.member_connected,
    (Phase.COLLECTING, AgentDisconnected): collecting.member_disconnected,
    (Phase.COLLECTING, Ready): collecting.late_ready,
    (Phase.COLLECTING, Declined): collecting.collecting_declined,
    (Phase.COLLECTING, Uploaded): collecting.uploaded,
    (Phase.COLLECTING, Tick): collecting.collecting_tick,
    (Phase.COLLECTING, SumFailed): applying.sum_failed,
    (Phase.SUMMING, SumStored): applying.sum_stored,
    (Phase.SUMMING, SumFailed): applying.sum_failed,
    (Phase.APPLYING, AgentConnected): applying.applying_connected,
    (Phase.APPLYING, AgentDisconnected): applying.applying_disconnected,
    (Phase.APPLYING, Applied): applying.applied,
    (Phase.APPLYING, Declined): applying.applying_declined,
    (Phase.APPLYING, Tick): applying.applying_tick,
    (Phase.RETURNING, AgentConnected): applying.returning_connected,
    (Phase.RETURNING, AgentDisconnected): applying.returning_disconnected,
    (Phase.RETURNING, Declined): applying.returning_declined,
    (Phase.RETURNING, Tick): applying.returning_tick,
    (Phase.RETURNING, SumReturned): applying.sum_returned,
}

_OTHERWISE: dict[type[Event], Callable[..., Step]] = {
    TakenUp: _take_up,
    AgentConnected: _connected,
    AgentDisconnected: _disconnected,
    AgentRemoved: _remove,
    Wished: _obey,
    Tick: _ignore,
    KeyShared: _ignore,
    Ready: _refuse,
    Declined: _refuse,
    Applied: _refuse,
    Uploaded: _illegal,
    SumStored: _illegal,
    SumFailed: _illegal,
    SumReturned: _illegal,
}
