"""Pace steering: laws of each answer, and a fleet of ten thousand through half a day."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pacing import HOUR, PacedFleet, World, unpaced
from coordinator import pacing
from coordinator.events import AgentConnected, AgentDisconnected
from coordinator.pacing import Fleet, Need
from coordinator.run_state import Phase
from coordinator.selection import Pacing, Selection, Traits
from coordinator.services import limits
from coordinator.services.limits import Admission, Limits
from coordinator.steering import COUNT_SECONDS, Steering
from fedloom.errors import Reason, Refused
from tests.coordinator.samples import POLICY, Run

LEAST, MOST = pacing.LEAST_AWAY_SECONDS, 2 * pacing.MEAN_AWAY_SECONDS
LARGE, SMALL = Fleet(1_000_000, 3840), Fleet(5, 3840)

fleets = st.builds(Fleet, st.integers(0, 10**8), st.integers(1, 10**5))
seconds = st.floats(0, 1e6)
needs = st.builds(Need, st.integers(0, 10**4), seconds, seconds, st.floats(1, 1e6))
draws = st.text(max_size=6)
_names = [f"agent-{i}" for i in range(40)]


@given(fleets, needs)
def test_enough_agents_come_and_no_more_than_the_coordinator_takes(
    fleet: Fleet, need: Need
) -> None:
    mean = pacing.mean_away(fleet, need)
    assert 0 <= mean <= pacing.MEAN_AWAY_SECONDS
    seconds = max(1.0, need.round_seconds or pacing.FIRST_ROUND_SECONDS)
    wanted = pacing.MARGIN * max(1, need.reserve) / seconds
    rate = min(wanted, pacing.ARRIVALS_PER_SECOND)
    assert fleet.enrolled >= rate * mean * (1 - 1e-9)
    if mean < pacing.MEAN_AWAY_SECONDS:
        assert fleet.enrolled <= rate * mean * (1 + 1e-9)


@given(fleets, needs, st.integers(0, 10**5), draws)
def test_nobody_is_sent_away_for_moments_or_for_days(
    fleet: Fleet, need: Need, waiting: int, draw: str
) -> None:
    away = pacing.surplus_away(fleet, need, waiting, draw)
    assert away == 0 or LEAST <= away <= MOST
    assert away == pacing.surplus_away(fleet, need, waiting, draw)
    if 2 * waiting > fleet.streams:
        assert away > 0, "streams run short"
    assert LEAST <= pacing.refused_away(fleet, draw) <= MOST


@given(needs, draws)
def test_the_reserve_is_back_before_a_long_round_ends(need: Need, draw: str) -> None:
    away = pacing.reserve_away(need, draw)
    left = min(need.seconds_left, need.patience_seconds / 2)
    if left < pacing.LONG_ROUND_SECONDS:
        assert away == 0
    else:
        assert left / 2 - 1 <= away <= left * 3 / 4


@given(
    fleets,
    needs,
    st.frozensets(st.sampled_from(_names)),
    st.frozensets(st.sampled_from(_names)),
    draws,
)
def test_as_many_as_the_next_round_wants_stay_or_are_back_in_time(
    fleet: Fleet, need: Need, waiting: frozenset[str], able: frozenset[str], draw: str
) -> None:
    away = pacing.dismissed(fleet, need, waiting, able, draw)
    assert set(away) == waiting
    in_time = {agent for agent in waiting & able if away[agent] <= need.seconds_left * 3 / 4}
    assert len(in_time) >= min(need.reserve, len(waiting & able))
    assert away == pacing.dismissed(fleet, need, waiting, able, draw)


@given(needs.filter(lambda need: need.seconds_left < pacing.LONG_ROUND_SECONDS), draws)
def test_a_fleet_that_would_be_back_at_once_stays(need: Need, draw: str) -> None:
    need = replace(need, round_seconds=min(need.round_seconds or 60.0, 20.0))
    assert pacing.arrival(SMALL, need, 5, True, draw) == 0


def test_a_fleet_that_is_sent_away_together_comes_back_evenly() -> None:
    need = Need(130, 300.0)
    waiting = frozenset(f"agent-{i}" for i in range(20_000))
    away = pacing.dismissed(LARGE, replace(need, reserve=0), waiting, waiting, "7/1/0")
    bins = 20
    longest = 2 * pacing.MEAN_AWAY_SECONDS - LEAST
    counts = Counter(int(bins * (a - LEAST) / (longest - LEAST + 1)) for a in away.values())
    expected = len(waiting) / bins
    chi_square = sum((counts[i] - expected) ** 2 / expected for i in range(bins))
    assert 6.8 < chi_square < 38.6  # 19 degrees of freedom: 0.5 % on either side


@pytest.mark.parametrize(("enrolled", "spread"), [(0, 0), (199, 0), (1000, 5), (10**6, 19)])
def test_a_restart_is_spread_over_what_it_takes_to_admit_all(enrolled: int, spread: int) -> None:
    assert Fleet(enrolled, 3840).spread_seconds == spread


# with a run


def _steering(enrolled: int = 1_000_000) -> Steering:
    return Steering(lambda: enrolled, 3840, lambda: 0.0)


def _training(selection: Selection) -> Run:
    """A run of three in training, with x connected and not invited."""
    run = Run()
    policy = replace(POLICY, selection=selection, minimum_agents=3)
    run.state = replace(run.state, policy=policy)
    for agent in "abc":
        run.on(AgentConnected(agent))
    run.on(AgentConnected("x"))
    assert run.state.phase is Phase.TRAINING
    return run


def test_whoever_is_needed_stays() -> None:
    state = _training(Selection(reserve=1 / 3)).state
    steering = _steering()
    assert steering.arrival("a", state, 1.0) == 0, "invited"
    assert steering.arrival("x", state, 1.0) == 0, "the one of the reserve"
    more = replace(state, connected=state.connected | {"y"})
    assert steering.arrival("y", more, 1.0) >= LEAST
    gathering = replace(more, phase=Phase.GATHERING, invited=frozenset())
    assert steering.arrival("y", gathering, 1.0) == 0, "the round waits for agents"
    assert steering.arrival("y", replace(gathering, paused=True), 1.0) >= LEAST


def test_an_agent_that_no_round_may_invite_takes_nobodys_place() -> None:
    run = Run()
    policy = replace(POLICY, selection=Selection(engine="torch"))
    run.state = replace(run.state, policy=policy)
    run.on(AgentConnected("x"), AgentConnected("y", Traits(engines=("torch",))))
    assert run.state.phase is Phase.GATHERING
    assert _steering().arrival("x", run.state, 1.0) >= LEAST
    assert _steering().arrival("y", run.state, 1.0) == 0


def test_pacing_can_be_switched_off() -> None:
    state = _training(Selection(reserve=0.0, pacing=Pacing.NONE)).state
    assert _steering().arrival("x", state, 1.0) == 0
    assert _steering().dismissed(frozenset("x"), state, 1.0) == {"x": 0}


def test_who_was_in_the_round_before_is_not_the_reserve() -> None:
    state = _training(Selection(reserve=1 / 3)).state
    waiting = frozenset("xy")
    state = replace(state, connected=state.connected | waiting, recent=(frozenset("x"),))
    away = _steering().dismissed(waiting, state, 1.0)
    assert away["y"] == 0
    assert away["x"] >= LEAST


def test_a_long_round_lets_the_reserve_go() -> None:
    state = replace(_training(Selection()).state, round_seconds=7200.0)
    patient = replace(state, policy=replace(state.policy, gathering_seconds=1e6))
    assert 3599 <= _steering(5).arrival("x", patient, 0.0) <= 5400
    hasty = replace(state, policy=replace(state.policy, gathering_seconds=2000.0))
    assert 499 <= _steering(5).arrival("x", hasty, 0.0) <= 750


def test_without_a_run_agents_leave_only_when_streams_run_short() -> None:
    steering = _steering()
    assert steering.without_run("a", 1920) == 0
    assert LEAST <= steering.without_run("a", 1921) <= MOST


def test_agents_are_counted_once_in_a_while() -> None:
    now, counted = [0.0], []
    steering = Steering(lambda: counted.append(now[0]) or len(counted), 3840, lambda: now[0])
    for moment in (0.0, COUNT_SECONDS - 1, COUNT_SECONDS, COUNT_SECONDS + 1):
        now[0] = moment
        assert steering.fleet.enrolled == len(counted)
    assert counted == [0.0, COUNT_SECONDS]


def test_a_disconnected_agent_leaves_no_trace() -> None:
    run = _training(Selection())
    run.on(AgentDisconnected("x"))
    assert "x" not in run.state.connected
    assert "x" not in run.state.traits


# no free stream


async def test_whoever_finds_every_stream_taken_is_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HOLD_SECONDS", 0.0)
    admission = Admission(Limits(connections=32))
    admission.retry_seconds = lambda agent: 1234.0
    async with AsyncExitStack() as calls:
        for number in range(30):
            call = await calls.enter_async_context(admission.call(f"ipv4:10.0.0.{number}:1"))
            await call.stream(f"agent-{number}")
        late = await calls.enter_async_context(admission.call("ipv4:10.0.1.1:1"))
        with pytest.raises(Refused) as caught:
            await late.stream("late")
    assert (caught.value.reason, caught.value.retry_after) == (Reason.BUSY, 1234.0)
    await asyncio.sleep(0)
    assert admission.streams.total() == 0


# a fleet


@pytest.fixture(scope="module")
def world() -> World:
    return World(
        devices=10_000,
        seconds=12 * HOUR,
        size=10,
        restart_at=7 * HOUR,
        seed=3,
    )


def test_a_paced_fleet_comes_evenly_and_every_round_finds_enough(world: World) -> None:
    found = PacedFleet(world).run()
    wild = unpaced(world)
    assert found.peak <= 8 < wild.peak / 10  # 0.3 a second are wanted
    assert found.restart_peak <= 10 < wild.restart_peak / 100
    assert found.rounds > 100
    assert found.short_rounds <= 2, "one after the restart"
    assert found.longest_gap <= world.restart_seconds + 600
    assert found.busy == 0
    assert found.served > 4 * found.rounds, "expected other devices all the time"
    assert found.most_invitations < found.rounds / 5
