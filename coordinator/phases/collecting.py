"""TRAINING and COLLECTING: from the invitations to the updates of a cohort."""

from dataclasses import replace

from coordinator.events import (
    AgentConnected,
    CloseCohort,
    Declined,
    Invite,
    OpenCohort,
    Ready,
    Reject,
    RepeatCohort,
    Tick,
    Uploaded,
)
from coordinator.phases.gathering import (
    Step,
    admit,
    exclude,
    learn,
    try_round_again,
    wrong_round,
)
from coordinator.run_state import Phase, RunState
from fedloom.errors import Reason


class IllegalEvent(Exception):
    """Our own code sent an event that the state does not allow."""


# TRAINING


def invited_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    """Invite an agent again that may have missed it."""
    again = event.agent in state.invited and event.agent not in state.ready
    effects = (Invite(frozenset({event.agent})),) if again else ()
    return admit(state, event.agent, event.traits), effects


def ready(state: RunState, event: Ready, now: float) -> Step:
    """Count an agent that has an update."""
    if event.round != state.round or event.agent not in state.invited:
        return wrong_round(state, event.agent)
    readies = {**state.ready, event.agent: event.weight_class}
    learned = learn(state, event.agent, event.training_seconds)
    return _form_cohort_when_enough(replace(learned, ready=readies), now)


def training_declined(state: RunState, event: Declined, now: float) -> Step:
    """Go on without an agent."""
    if event.round != state.round or event.agent not in state.invited:
        return wrong_round(state, event.agent)
    return _form_cohort_when_enough(exclude(state, event.agent, event.reason), now)


def _form_cohort_when_enough(state: RunState, now: float) -> Step:
    enough = state.policy.enough
    all_answered = state.invited - set(state.excluded) <= set(state.ready)
    if all_answered or (enough and len(set(state.ready) - set(state.excluded)) >= enough):
        return _form_cohort(state, now)
    return state, ()


def training_tick(state: RunState, event: Tick, now: float) -> Step:
    """Go on with those who are ready at the deadline."""
    return _form_cohort(state, now) if now >= state.deadline else (state, ())


def _form_cohort(state: RunState, now: float) -> Step:
    usable = [agent for agent in state.ready if agent not in state.excluded]
    members = sorted(usable[: state.policy.cohort_size])  # the first, if more were invited
    if len(members) < state.policy.minimum_agents:
        return try_round_again(state, now)
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


def member_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    """Tell a member again what it may have missed, unless its update is in."""
    admitted = admit(state, event.agent, event.traits)
    if event.agent not in state.cohort or event.agent in state.uploaded:
        return admitted, ()
    # The agent may have restarted and lost its update: the invitation lets it train again.
    return admitted, (Invite(frozenset({event.agent})), RepeatCohort(event.agent))


def late_ready(state: RunState, event: Ready, now: float) -> Step:
    """Refuse an agent that comes after the cohort was formed."""
    if event.round == state.round and event.agent in state.cohort:
        return state, ()  # it trained again after a restart; its weight class is fixed already
    subject = f"expected READY before the cohort of round {state.round} was formed"
    return state, (Reject(event.agent, Reason.DEADLINE_PASSED, subject),)


def collecting_declined(state: RunState, event: Declined, now: float) -> Step:
    """Wait no more for a member's update; one that is in stays in."""
    if event.round != state.round or event.agent not in state.cohort:
        return wrong_round(state, event.agent)
    if event.agent in state.uploaded:
        return state, ()
    return close_when_all_uploaded(exclude(state, event.agent, event.reason), now)


def uploaded(state: RunState, event: Uploaded, now: float) -> Step:
    """Count an update that is in the sum."""
    if event.agent not in state.cohort:
        raise IllegalEvent(f"expected an upload of a member, found one of {event.agent}")
    updates = {**state.uploaded, event.agent: event.sha256}
    return close_when_all_uploaded(replace(state, uploaded=updates), now)


def close_when_all_uploaded(state: RunState, now: float) -> Step:
    """Close the sum once nobody is missing."""
    missing = set(state.cohort) - set(state.excluded) - set(state.uploaded)
    return (state, ()) if missing else _close_cohort(state, now)


def collecting_tick(state: RunState, event: Tick, now: float) -> Step:
    """Go on with the updates that are in at the deadline."""
    return _close_cohort(state, now) if now >= state.deadline else (state, ())


def _close_cohort(state: RunState, now: float) -> Step:
    if len(state.uploaded) < state.policy.minimum_agents:
        return try_round_again(state, now)
    return replace(state, phase=Phase.SUMMING), (CloseCohort(),)
