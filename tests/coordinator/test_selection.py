"""Who is invited: caps, draws and needs as laws; and `[selection]` of a run file."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.config import parse_run_config
from coordinator.events import AgentConnected, Invite, OpenCohort, Ready, Reject
from coordinator.run_state import Phase
from coordinator.selection import (
    UNIFORM,
    UNKNOWN,
    Bounds,
    Pacing,
    Selection,
    SelectionRule,
    Traits,
    choose,
    eligible,
    fewest_agents,
    last_rounds,
    weight,
)
from fedloom.errors import ConfigError, Reason
from tests.coordinator.samples import POLICY, Run

NOW = 1000.0
FAST, SLOW = Traits(training_seconds=5.0), Traits(training_seconds=40.0)
CAPABILITY = Selection(SelectionRule.CAPABILITY, round_seconds=10.0)

_agents = st.frozensets(st.sampled_from([f"agent-{i}" for i in range(12)]), max_size=12)
_traits = st.builds(
    Traits,
    memory_bytes=st.sampled_from([0, 10**9, 4 * 10**9]),
    samples_per_second=st.sampled_from([0.0, 4.0, 64.0]),
    training_seconds=st.sampled_from([0.0, 5.0, 40.0, 1e9]),
    engines=st.sampled_from([(), ("onnx",), ("onnx", "torch")]),
    available_until=st.sampled_from([0.0, NOW - 1, NOW + 6, NOW + 1000]),
)
_selections = st.builds(
    Selection,
    rule=st.sampled_from(SelectionRule),
    over_selection=st.sampled_from([1.0, 1.3, 2.0]),
    round_seconds=st.just(10.0),
    least_memory_mb=st.sampled_from([0, 1000]),
    least_samples_per_second=st.sampled_from([0.0, 5.0]),
    engine=st.sampled_from(["", "torch"]),
)


# what an agent must have


@given(_selections, st.dictionaries(st.sampled_from("abcdef"), _traits))
def test_whoever_may_be_invited_has_what_the_run_asks_for(
    selection: Selection, traits: dict[str, Traits]
) -> None:
    agents = {*traits, "silent"}
    found = eligible(selection, agents, traits, (), NOW)
    assert found <= agents
    for agent in agents:
        said = traits.get(agent, UNKNOWN)
        expected = (
            said.memory_bytes >= selection.least_memory_mb * 10**6
            and said.samples_per_second >= selection.least_samples_per_second
            and selection.engine in ("", *said.engines)
        )
        if said.available_until:
            needed = 0.0 if selection.rule is SelectionRule.UNIFORM else said.training_seconds or 10
            expected = expected and said.available_until > NOW + needed
        assert (agent in found) == expected


# the cap


@given(
    cap=st.integers(1, 3),
    more=st.integers(1, 4),
    size=st.integers(1, 4),
    here=st.lists(_agents, min_size=1, max_size=30),
    over=st.sampled_from([1.0, 1.5]),
)
def test_nobody_is_invited_above_the_cap_in_any_window(
    cap: int, more: int, size: int, here: list[frozenset[str]], over: float
) -> None:
    selection = Selection(over_selection=over, most_rounds=cap, window=cap + more)
    rounds: list[frozenset[str]] = []
    recent: tuple[frozenset[str], ...] = ()
    for number, agents in enumerate(here):
        may = eligible(selection, agents, {}, recent, NOW)
        chosen = choose(selection, may, {}, size, str(number))
        assert len(chosen) == min(len(may), selection.invitations(size))
        rounds.append(chosen)
        recent = last_rounds(selection, (*recent, chosen))
        assert len(recent) < selection.window
        counts = Counter(agent for invited in rounds[-selection.window :] for agent in invited)
        assert max(counts.values(), default=0) <= cap


@given(
    cap=st.integers(1, 3), more=st.integers(1, 3), size=st.integers(1, 4), minimum=st.integers(1, 4)
)
def test_as_many_agents_as_are_asked_for_keep_every_round_supplied(
    cap: int, more: int, size: int, minimum: int
) -> None:
    selection = Selection(most_rounds=cap, window=cap + more)
    bounds = Bounds(min(minimum, size), size, 0, 10_000, 60.0)
    agents = {f"agent-{i}" for i in range(fewest_agents(selection, bounds))}
    recent: tuple[frozenset[str], ...] = ()
    for number in range(40):
        may = eligible(selection, agents, {}, recent, NOW)
        assert len(may) >= bounds.minimum
        recent = last_rounds(selection, (*recent, choose(selection, may, {}, size, str(number))))


def test_without_a_cap_only_the_last_round_is_remembered() -> None:
    assert last_rounds(UNIFORM, (frozenset("ab"), frozenset("c"))) == (frozenset("c"),)


# the draw


@given(_selections, _agents, st.integers(1, 12), st.text(max_size=5))
def test_a_choice_is_a_fixed_sample_of_the_size_asked_for(
    selection: Selection, agents: frozenset[str], places: int, draw: str
) -> None:
    traits = dict.fromkeys(sorted(agents)[::2], SLOW)
    chosen = choose(selection, agents, traits, places, draw)
    assert chosen <= agents
    assert len(chosen) == min(len(agents), selection.invitations(places))
    assert chosen == choose(selection, agents, dict(reversed(traits.items())), places, draw)


@pytest.mark.parametrize("rule", SelectionRule)
def test_agents_of_equal_speed_are_drawn_uniformly(rule: SelectionRule) -> None:
    agents = {f"agent-{i}" for i in range(20)}
    selection, rounds, places = replace(CAPABILITY, rule=rule), 2000, 5
    counts = Counter(
        agent
        for number in range(rounds)
        for agent in choose(selection, agents, dict.fromkeys(agents, FAST), places, f"7/{number}")
    )
    expected = rounds * places / len(agents)
    # A draw without replacement varies by (1 - places/agents) less than the multinomial one.
    variance = expected * (1 - places / len(agents))
    chi_square = sum((counts[agent] - expected) ** 2 for agent in agents) / variance
    assert 6.8 < chi_square * 19 / 20 < 43.9  # 19 degrees of freedom: 0.5 % on either side


def test_slower_agents_are_drawn_as_rarely_as_their_weight_says() -> None:
    """One place: the draw by keys is then exactly proportional to the weights."""
    traits = {"fast": FAST, "slow": Traits(training_seconds=20.0), "unknown": UNKNOWN}
    assert [weight(CAPABILITY, traits[a]) for a in sorted(traits)] == [1.0, 0.25, 1.0]
    rounds = 9000
    counts = Counter(
        agent
        for number in range(rounds)
        for agent in choose(CAPABILITY, set(traits), traits, 1, f"3/{number}")
    )
    for agent, share in (("fast", 4 / 9), ("unknown", 4 / 9), ("slow", 1 / 9)):
        deviation = (rounds * share * (1 - share)) ** 0.5
        assert abs(counts[agent] - rounds * share) < 4 * deviation


@pytest.mark.parametrize("rule", SelectionRule)
def test_everybody_is_chosen_in_the_end(rule: SelectionRule) -> None:
    """With a slow half whose weight is 1/16: rounds enough for a miss to be one in a million."""
    selection = replace(CAPABILITY, rule=rule, over_selection=1.3)
    agents = [f"agent-{i}" for i in range(30)]
    traits = {agent: SLOW if i % 2 else FAST for i, agent in enumerate(agents)}
    waiting = set(agents)
    for number in range(600):
        waiting -= choose(selection, set(agents), traits, 4, f"1/{number}")
    assert not waiting


# in a run


def _run(selection: Selection, size: int = 2, minimum: int = 2) -> Run:
    run = Run()
    policy = replace(POLICY, cohort_size=size, minimum_agents=minimum, selection=selection)
    run.state = replace(run.state, policy=policy, connected=frozenset("abcdefg"))
    return run


def test_the_first_to_be_ready_make_the_cohort_and_the_rest_are_too_late() -> None:
    run = _run(Selection(over_selection=1.5), size=4)
    effects = run.on(AgentConnected("h"))
    assert effects == (Invite(run.state.invited),)
    assert len(run.state.invited) == 6
    *first, fourth, late, _silent = sorted(run.state.invited)
    for agent in first:
        assert run.on(Ready(agent, 1, 3)) == ()
    assert run.on(Ready(fourth, 1, 3)) == (OpenCohort(),)
    assert (run.state.phase, run.state.cohort) == (Phase.COLLECTING, (*first, fourth))
    (effect,) = run.on(Ready(late, 1, 3))
    assert isinstance(effect, Reject)
    assert effect.reason is Reason.DEADLINE_PASSED


def test_a_cohort_never_has_more_members_than_places() -> None:
    """Even where one that had declined comes back and is ready already."""
    run = _run(Selection(over_selection=2.0))
    run.on(AgentConnected("h"))
    first, second, third, _ = sorted(run.state.invited)
    run.state = replace(run.state, ready={second: 1, first: 1})
    run.on(Ready(third, 1, 3))
    assert run.state.cohort == (first, second)


def test_what_training_took_is_remembered_while_the_agent_is_here() -> None:
    run = _run(UNIFORM)
    run.on(AgentConnected("h", Traits(memory_bytes=1)))
    first, second = sorted(run.state.invited)
    run.on(Ready(first, 1, 3, training_seconds=7.5))
    run.on(Ready(second, 1, 3))
    assert run.state.traits[first].training_seconds == 7.5
    assert second not in run.state.traits or not run.state.traits[second].training_seconds


def test_a_round_waits_for_agents_that_suit() -> None:
    run = _run(Selection(engine="torch"))
    able = Traits(engines=("torch",))
    assert run.on(AgentConnected("x", able)) == ()
    assert run.on(AgentConnected("y", able)) == (Invite(frozenset("xy")),)


# the file

_PATH = Path("/runs/intent.toml")
_LEAST: dict[str, Any] = {"plan": "plans/intent", "rounds": 5}


def _parsed(**selection: Any) -> Selection:
    return parse_run_config(_LEAST | {"selection": selection}, _PATH).selection


def test_what_is_not_stated_is_uniform() -> None:
    assert parse_run_config(_LEAST, _PATH).selection == UNIFORM
    policy = parse_run_config(_LEAST | {"deadlines": {"training": 50}}, _PATH).policy
    assert policy.selection == replace(UNIFORM, round_seconds=50.0)


def test_a_whole_table() -> None:
    found = _parsed(
        rule="capability",
        over_selection=1.3,
        most_rounds=1,
        window=3,
        round_seconds=120,
        least_memory_mb=512,
        least_samples_per_second=2,
        engine="onnx",
        pacing="none",
        reserve=2,
    )
    assert found == Selection(
        SelectionRule.CAPABILITY, 1.3, 1, 3, 120.0, 512, 2.0, "onnx", Pacing.NONE, 2.0
    )


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"rule": "fastest"}, "selection.rule: expected one of"),
        ({"over_selection": 0.5}, "selection.over_selection: expected 1..10, found 0.5"),
        ({"over_selection": float("nan")}, "selection.over_selection: expected 1..10, found nan"),
        ({"most_rounds": 2}, "expected 0 < most_rounds < window"),
        ({"window": 5}, "expected 0 < most_rounds < window"),
        ({"most_rounds": 5, "window": 5}, "without a cap leave both out"),
        ({"round_seconds": 5}, 'expected with rule = "available" or "capability"'),
        ({"rule": "capability", "round_seconds": 1e6}, "selection.round_seconds: expected 0..3600"),
        ({"least_memory_mb": -1}, "selection.least_memory_mb: expected 0.."),
        ({"least_samples_per_second": float("inf")}, "selection.least_samples_per_second"),
        ({"engine": "jax"}, "selection.engine: expected one of"),
        ({"reserve": -1.0}, "selection.reserve: expected 0..100"),
        ({"fairness": 1}, "selection.fairness: unknown key"),
    ],
)
def test_what_cannot_work_is_named(table: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _parsed(**table)
    assert problem in caught.value.problem


def test_a_cap_that_starves_the_stated_population_is_refused() -> None:
    cohort = {"minimum": 3, "size": 10, "population": 12}
    table = _LEAST | {"cohort": cohort, "selection": {"most_rounds": 1, "window": 2}}
    with pytest.raises(ConfigError, match=r"cohort.population: expected at least 13"):
        parse_run_config(table, _PATH)


def test_too_many_invitations_are_refused() -> None:
    table = _LEAST | {"cohort": {"size": 9000}, "selection": {"over_selection": 1.3}}
    with pytest.raises(ConfigError, match=r"over_selection: expected at most 1.1"):
        parse_run_config(table, _PATH)
