"""What does not fit a run's state changes nothing: refusals for agents, `IllegalEvent` for us."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.events import (
    AgentConnected,
    AgentDisconnected,
    AgentRemoved,
    Applied,
    Declined,
    Event,
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
from coordinator.rounds import IllegalEvent, handle
from coordinator.run_state import Phase, RunState, Wish
from coordinator.selection import select
from fedloom.errors import Reason
from tests.coordinator.samples import SHA, Run

OURS = (Uploaded, SumStored, SumFailed, SumReturned)
RIGHT_PHASES: dict[type[Event], tuple[Phase, ...]] = {
    Ready: (Phase.TRAINING,),
    Applied: (Phase.APPLYING,),
    Declined: (Phase.TRAINING, Phase.COLLECTING, Phase.APPLYING, Phase.RETURNING),
    Uploaded: (Phase.COLLECTING,),
    SumStored: (Phase.SUMMING,),
    SumFailed: (Phase.COLLECTING, Phase.SUMMING),
    SumReturned: (Phase.RETURNING,),
}
EVENTS: tuple[Event, ...] = (
    AgentConnected("a"),
    AgentDisconnected("a"),
    KeyShared("a", 1, {"a": b""}),
    Ready("a", 1, 3),
    Declined("a", 1, Reason.DATA_EMPTY),
    Uploaded("a", SHA),
    SumStored(),
    SumFailed(),
    Applied("a", 1, SHA),
    SumReturned("a"),
    AgentRemoved("a"),
    Wished(Wish.CANCEL),
    TakenUp(frozenset("a")),
    Tick(),
)
_agents = st.sampled_from(["a", "b", "stranger"])
_stale_rounds = st.integers(0, 2**32 - 1).filter(lambda number: number != 1)


def state_in(phase: Phase) -> RunState:
    """A run of one round in the phase, with the agents a and b."""
    run = Run(rounds=1)
    if phase is Phase.RETURNING:
        run.state = replace(run.state, policy=replace(run.state.policy, returns_sums=True))
    state = run.to(phase).state
    assert state.phase is phase
    return state


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("phase", Phase)
def test_every_event_is_decided_in_every_phase(phase: Phase, event: Event) -> None:
    state = state_in(phase)
    fits = phase.over or phase in RIGHT_PHASES.get(type(event), ())
    if type(event) in OURS and not fits:
        with pytest.raises(IllegalEvent):
            handle(state, event, 1.0)
        assert state == state_in(phase)
    else:
        after, effects = handle(state, event, 1.0)
        assert isinstance(after, RunState)
        assert isinstance(effects, tuple)


def test_the_examples_are_the_whole_alphabet() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))


def _refusal_or_nothing(state: RunState, event: Ready | Declined | Applied | KeyShared) -> None:
    after, effects = handle(state, event, 1.0)
    assert after == state
    assert len(effects) <= 1
    for effect in effects:
        assert isinstance(effect, Reject)
        assert effect.agent == event.agent
        assert effect.reason in (Reason.WRONG_ROUND, Reason.DEADLINE_PASSED)
        assert effect.subject.startswith("expected ")


_steps = st.one_of(
    st.builds(Ready, _agents, st.just(1), st.integers(0, 24)),
    st.builds(Declined, _agents, st.just(1), st.sampled_from(Reason)),
    st.builds(Applied, _agents, st.just(1), st.binary(min_size=32, max_size=32)),
)


@given(_steps, st.sampled_from(Phase))
def test_a_step_in_the_wrong_phase_changes_nothing(
    step: Ready | Declined | Applied, phase: Phase
) -> None:
    if phase not in RIGHT_PHASES[type(step)]:
        _refusal_or_nothing(state_in(phase), step)


@given(st.sampled_from(Phase), _agents, _stale_rounds)
def test_a_step_of_another_round_changes_nothing(phase: Phase, agent: str, stale: int) -> None:
    state = state_in(phase)
    _refusal_or_nothing(state, Ready(agent, stale, 0))
    _refusal_or_nothing(state, Applied(agent, stale, SHA))
    _refusal_or_nothing(state, Declined(agent, stale, Reason.INTERNAL))


@given(_steps, st.sampled_from(Phase))
def test_a_step_of_a_stranger_changes_nothing(
    step: Ready | Declined | Applied, phase: Phase
) -> None:
    if step.agent == "stranger":
        _refusal_or_nothing(state_in(phase), step)


@pytest.mark.parametrize("phase", Phase)
def test_a_key_that_nobody_asked_for_changes_nothing(phase: Phase) -> None:
    _refusal_or_nothing(state_in(phase), KeyShared("a", 1, {"a": b"", "b": b""}))


def test_an_upload_of_no_member_is_our_bug() -> None:
    with pytest.raises(IllegalEvent, match="stranger"):
        handle(state_in(Phase.COLLECTING), Uploaded("stranger", SHA), 1.0)


# who is invited

_candidates = st.frozensets(st.text(max_size=3), max_size=12)
_seeds = st.integers(0, 2**64 - 1)


@given(_candidates, st.integers(0, 15), _seeds, st.integers(1, 10**6))
def test_a_selection_is_a_fixed_sample_of_the_size_asked_for(
    candidates: frozenset[str], count: int, seed: int, number: int
) -> None:
    chosen = select(candidates, count, f"{seed}/{number}")
    assert chosen <= candidates
    assert len(chosen) == min(count, len(candidates))
    assert chosen == select(candidates, count, f"{seed}/{number}")


def test_every_candidate_is_chosen_about_equally_often() -> None:
    candidates = {f"agent-{number}" for number in range(10)}
    rounds = [select(candidates, 3, f"7/{number}") for number in range(1, 2001)]
    for agent in candidates:  # 600 expected; the deviation is 20.5, and the seed is fixed
        assert 500 < sum(agent in chosen for chosen in rounds) < 700
