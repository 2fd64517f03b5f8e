"""TRAINING and COLLECTING: from the invitations to the updates of a cohort."""

from dataclasses import replace

from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
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
    leave,
    try_round_again,
    wrong_round,
)
from coordinator.run_state import Phase, RunState
from coordinator.selection import eligible
from crypto.cohort.quorum import least_accepted
from fedloom.errors import Reason


class IllegalEvent(Exception):
    """Our own code sent an event that the state does not allow."""


# TRAINING


def invited_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    """Invite an agent again that may have missed it; asynchronously, one that has just come."""
    admitted = admit(state, event.agent, event.traits)
    admitted = invite_newcomers(admitted, frozenset({event.agent}), now)
    again = event.agent in admitted.invited and event.agent not in state.ready
    effects = (Invite(frozenset({event.agent})),) if again else ()
    return admitted, effects


def invite_newcomers(state: RunState, agents: frozenset[str], now: float) -> RunState:
    """Take those into an asynchronous round that can take part; a key waits for the next one."""
    if not state.policy.is_asynchronous:
        return state
    if state.policy.needs_key:
        agents = state.keys.able(agents, state.past_keys)
    may = eligible(
        state.policy.selection, agents & state.candidates, state.traits, state.recent, now
    )
    return replace(state, invited=state.invited | may)


def invited_disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    """Asynchronously, wait no more for an agent that is away, nor have it in the cohort."""
    gone = leave(state, event.agent)
    if not state.policy.is_asynchronous:
        return gone, ()
    return form_cohort_when_enough(ready_and_here(gone), now)


def ready_and_here(state: RunState) -> RunState:
    """Count in an asynchronous round who is here and in; who comes back is asked again."""
    if not state.policy.is_asynchronous:
        return state
    ready = {agent: found for agent, found in state.ready.items() if agent in state.candidates}
    return replace(state, ready=ready)


def ready(state: RunState, event: Ready, now: float) -> Step:
    """Count an agent that has an update; one that was made from too old a state is not taken."""
    if not state.takes(event.round):
        return state, ()
    if event.round != state.round or event.agent not in state.invited:
        return wrong_round(state, event.agent)
    if state.policy.is_asynchronous and event.agent in state.excluded:
        return state, ()  # it declined: the next round asks it, or its next connection
    staleness = {**state.staleness, event.agent: 0}
    if state.policy.is_asynchronous:
        staleness[event.agent] = state.completed - event.base_rounds
    if not 0 <= staleness[event.agent] <= state.policy.max_staleness:
        return _refuse_staleness(state, event)
    readies = {**state.ready, event.agent: event.weight_class}
    learned = learn(state, event.agent, event.training_seconds)
    counted = replace(learned, ready=readies, staleness=staleness)
    return form_cohort_when_enough(counted, now)


def _refuse_staleness(state: RunState, event: Ready) -> Step:
    """Say so, and invite the agent again: it goes on from the newest state."""
    least = max(0, state.completed - state.policy.max_staleness)
    subject = (
        f"expected an update from a state after {least}..{state.completed} rounds, found one after "
        f"{event.base_rounds}"
    )
    reject = Reject(event.agent, Reason.DEADLINE_PASSED, subject)
    if event.agent in state.ready:
        return state, (reject,)
    return state, (reject, Invite(frozenset({event.agent})))


def training_declined(state: RunState, event: Declined, now: float) -> Step:
    """Go on without an agent."""
    if not state.takes(event.round):
        return state, ()
    if event.round != state.round or event.agent not in state.invited:
        return wrong_round(state, event.agent)
    without = ready_and_here(exclude(state, event.agent, event.reason))
    return form_cohort_when_enough(without, now)


def form_cohort_when_enough(state: RunState, now: float) -> Step:
    """Go on with those who are ready, if they are enough or nobody else is waited for."""
    policy = state.policy
    awaited, found = state.invited - set(state.excluded), set(state.ready) - set(state.excluded)
    if policy.is_asynchronous and len(found) >= policy.minimum_agents:
        awaited &= state.connected
    all_answered = awaited <= set(state.ready)
    if all_answered or (policy.enough and len(found) >= policy.enough):
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
    if not state.takes(event.round):
        return state, ()
    subject = f"expected READY before the cohort of round {state.round} was formed"
    return state, (Reject(event.agent, Reason.DEADLINE_PASSED, subject),)


def collecting_declined(state: RunState, event: Declined, now: float) -> Step:
    """Wait no more for a member's update; one that is in stays in."""
    if event.round != state.round or event.agent not in state.cohort:
        return wrong_round(state, event.agent) if state.takes(event.round) else (state, ())
    if event.agent in state.uploaded:
        return state, ()
    return close_when_all_uploaded(exclude(state, event.agent, event.reason), now)


def member_disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    """Asynchronously, wait no more for a member that is away: a later sum takes its update."""
    gone = leave(state, event.agent)
    return close_when_all_uploaded(gone, now) if state.policy.is_asynchronous else (gone, ())


def uploaded(state: RunState, event: Uploaded, now: float) -> Step:
    """Count an update that is in the sum."""
    if event.agent not in state.cohort:
        raise IllegalEvent(f"expected an upload of a member, found one of {event.agent}")
    updates = {**state.uploaded, event.agent: event.sha256}
    return close_when_all_uploaded(replace(state, uploaded=updates), now)


def close_when_all_uploaded(state: RunState, now: float) -> Step:
    """Close the sum once nobody is missing."""
    missing = set(state.cohort) - set(state.excluded) - set(state.uploaded)
    if state.policy.is_asynchronous and len(state.uploaded) >= _enough(state):
        missing &= state.connected
    return (state, ()) if missing else _close_cohort(state, now)


def _enough(state: RunState) -> int:
    """Return how many of the cohort's updates make a sum that can be opened."""
    minimum = state.policy.minimum_agents
    return least_accepted(len(state.cohort), minimum) if state.policy.has_masks else minimum


def collecting_tick(state: RunState, event: Tick, now: float) -> Step:
    """Go on with the updates that are in at the deadline."""
    return _close_cohort(state, now) if now >= state.deadline else (state, ())


def _close_cohort(state: RunState, now: float) -> Step:
    if len(state.uploaded) < state.policy.minimum_agents:
        return try_round_again(state, now)
    return replace(state, phase=Phase.SUMMING), (CloseCohort(),)
