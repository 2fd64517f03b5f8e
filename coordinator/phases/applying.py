"""SUMMING, APPLYING and RETURNING: from the stored sum to the next round."""

from collections import Counter
from dataclasses import replace

from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
    Applied,
    AskForSum,
    CloseRound,
    Declined,
    Effect,
    FinishRun,
    PublishResult,
    Reject,
    SumFailed,
    SumReturned,
    SumStored,
    Tick,
)
from coordinator.phases.gathering import (
    Step,
    admit,
    exclude,
    fail,
    leave,
    start_gathering,
    try_round_again,
    void_round,
    wrong_round,
)
from coordinator.run_state import Phase, RunState, StateReport
from coordinator.selection import last_rounds
from fedloom.errors import Reason

CONFIRMING_AGENTS = 2  # a returned sum needs the hash of another agent than its sender's


def sum_stored(state: RunState, event: SumStored, now: float) -> Step:
    """Tell the agents where the sum is: from now on the round is history."""
    used = {state.keys.latest} if state.policy.needs_key else set()
    applying = replace(
        state,
        phase=Phase.APPLYING,
        deadline=now + state.policy.applying_seconds,
        applied={},
        past_keys=state.past_keys | used,
    )
    return applying, (PublishResult(applying.appliers & state.connected),)


def sum_failed(state: RunState, event: SumFailed, now: float) -> Step:
    """Ask for the updates again; under masks, who vouched for this sum must not give another."""
    return void_round(state, now) if state.policy.has_masks else try_round_again(state, now)


# APPLYING


def applying_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    """Tell an agent again where the sum is."""
    admitted = admit(state, event.agent, event.traits)
    again = event.agent in admitted.appliers and event.agent not in state.applied
    effects = (PublishResult(frozenset({event.agent})),) if again else ()
    return admitted, effects


def applying_disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    """Wait no more for an agent that is away."""
    gone = leave(state, event.agent)
    return go_on_without(state, gone, now)


def go_on_without(before: RunState, state: RunState, now: float) -> Step:
    """Wait for one fewer; others apply an asynchronous round whose members are all away."""
    after, effects = close_when_all_applied(state, now)
    told = (after.appliers - before.appliers) & after.connected
    if after is state and told:
        return after, (PublishResult(told),)
    return after, effects


def applied(state: RunState, event: Applied, now: float) -> Step:
    """Count an agent's state."""
    if event.round != state.round or event.agent not in state.appliers:
        return wrong_round(state, event.agent) if state.takes(event.round) else (state, ())
    report = StateReport(event.state_sha256, event.next_clip, event.opened_sha256, event.quality)
    reports = {**state.applied, event.agent: report}
    return close_when_all_applied(replace(state, applied=reports), now)


def applying_declined(state: RunState, event: Declined, now: float) -> Step:
    """Go on without an agent that cannot apply the round."""
    if event.round != state.round or event.agent not in state.appliers:
        return wrong_round(state, event.agent) if state.takes(event.round) else (state, ())
    return go_on_without(state, exclude(state, event.agent, event.reason), now)


def close_when_all_applied(state: RunState, now: float) -> Step:
    """Close the round once nobody who is here is missing."""
    missing = state.appliers - set(state.excluded) - set(state.applied)
    # Those who are away are not waited for, unless nobody has applied: a cut ends no run.
    if missing & state.connected or (missing and not state.applied):
        return state, ()
    return _agree(state, now)


def applying_tick(state: RunState, event: Tick, now: float) -> Step:
    """Go on with those who have applied the round at the deadline."""
    return _agree(state, now) if now >= state.deadline else (state, ())


def _agree(state: RunState, now: float) -> Step:
    """Go on with the agents whose state is the majority's; without any, the sum is of no use."""
    if not state.applied:
        reasons = Counter(state.excluded[a] for a in state.appliers if a in state.excluded)
        cause = reasons.most_common(1)[0][0] if reasons else Reason.QUORUM_NOT_REACHED
        return fail(state, cause)
    agreed = Counter(state.applied.values()).most_common(1)[0][0]
    diverged = sorted(agent for agent, report in state.applied.items() if report != agreed)
    subject = f"expected state {agreed.state_sha256.hex()} after the round"
    rejects = tuple(Reject(agent, Reason.STATE_DIVERGED, subject) for agent in diverged)
    after = replace(state, agreed=agreed)
    if state.policy.returns_sums:
        after, effects = _begin_returning(after, now)
    else:
        after, effects = _close_round(after, now)
    return after, (*rejects, *effects)


def _close_round(state: RunState, now: float) -> Step:
    policy, quality = state.policy, None if state.agreed is None else state.agreed.quality
    closed = replace(
        state,
        completed=state.completed + 1,
        previous_round=state.round,
        plateau=state.plateau.after(policy.plateau, quality),
        clip=0.0 if state.agreed is None else state.agreed.next_clip,
        failures=0,
        recent=last_rounds(policy.selection, (*state.recent, state.invited)),
        round_seconds=max(0.0, now - state.began),
    )
    if closed.completed == policy.rounds or closed.plateau.is_reached(policy.plateau):
        return replace(closed, phase=Phase.COMPLETED), (CloseRound(quality), FinishRun())
    following, effects = start_gathering(replace(closed, round=state.round + 1, attempt=0), now)
    return following, (CloseRound(quality), *effects)


# RETURNING


def _begin_returning(state: RunState, now: float) -> Step:
    agreeing = sorted(agent for agent, report in state.applied.items() if report == state.agreed)
    if len(agreeing) < CONFIRMING_AGENTS:
        return fail(state, Reason.QUORUM_NOT_REACHED)
    return ask_next(replace(state, phase=Phase.RETURNING, returners=tuple(agreeing)), now)


def ask_next(state: RunState, now: float) -> Step:
    """Ask the next agent that is here for the opened sum; those who are away may come back."""
    here = [agent for agent in state.returners if agent in state.connected]
    asked = here[0] if here else ""
    waiting = replace(state, returning=asked, deadline=now + state.policy.upload_seconds)
    effects: tuple[Effect, ...] = (AskForSum(asked),) if asked else ()
    return waiting, effects


def returning_connected(state: RunState, event: AgentConnected, now: float) -> Step:
    """Ask an agent again, or for the first time when nobody else is here."""
    admitted = admit(state, event.agent, event.traits)
    if event.agent in state.returners and state.returning in ("", event.agent):
        return ask_next(admitted, now)
    return admitted, ()


def returning_disconnected(state: RunState, event: AgentDisconnected, now: float) -> Step:
    """Ask another agent in the place of one that left; it may be asked again."""
    gone = leave(state, event.agent)
    return ask_next(gone, now) if event.agent == state.returning else (gone, ())


def returning_declined(state: RunState, event: Declined, now: float) -> Step:
    """Ask another agent in the place of one that has no sum."""
    if event.agent != state.returning or event.round != state.round:
        return wrong_round(state, event.agent)
    return _pass_over(state, now)


def returning_tick(state: RunState, event: Tick, now: float) -> Step:
    """Ask another agent in the place of one that is slow, as long as there is one."""
    return _pass_over(state, now) if now >= state.deadline else (state, ())


def _pass_over(state: RunState, now: float) -> Step:
    left = tuple(agent for agent in state.returners if agent != state.returning)
    if not left or not state.returning:
        return fail(state, Reason.DEADLINE_PASSED)
    return ask_next(replace(state, returners=left), now)


def sum_returned(state: RunState, event: SumReturned, now: float) -> Step:
    """The coordinator has what the run shall give it: the round is over."""
    return _close_round(state, now)
