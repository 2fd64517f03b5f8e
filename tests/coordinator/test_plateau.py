"""A run ends when its models get no better: the rule, and the machine with its journal."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.events import AgentConnected, Applied, CloseRound, FinishRun, Ready, Uploaded
from coordinator.events import SumStored as Stored
from coordinator.plateau import BEGINNING, PlateauRule
from coordinator.run_state import Phase, RunState
from fedloom.quality import Metric, Quality
from tests.coordinator.samples import SHA, Run

_VALUES = st.lists(st.one_of(st.none(), st.integers(0, 10).map(lambda n: n / 10)), max_size=30)


@given(_VALUES, st.integers(1, 4), st.sampled_from([0.0, 0.15]), st.booleans())
def test_patience_counts_measured_rounds_since_the_best(values, patience, delta, rises) -> None:
    metric = Metric.ACCURACY if rises else Metric.LOSS
    rule, plateau = PlateauRule(patience, metric, delta), BEGINNING
    seen: list[float] = []
    for value in values:
        quality = None if value is None else Quality(1.0, loss=value, accuracy=value)
        plateau = plateau.after(rule, quality)
        if value is not None:
            seen.append(value if rises else -value)
        records, best = [0], -9.0
        for place, one in enumerate(seen):
            if one - best > delta:
                records, best = [*records, place], one
        since = len(seen) - 1 - records[-1] if seen else 0
        assert plateau.rounds == since
        assert plateau.is_reached(rule) == (since >= patience)


def round_of(run: Run, number: int, quality: Quality | None) -> tuple[object, ...]:
    for agent in "ab":
        run.on(Ready(agent, number, 3))
    for agent in "ab":
        run.on(Uploaded(agent, SHA))
    run.on(Stored(), Applied("a", number, SHA, quality=quality))
    return run.on(Applied("b", number, SHA, quality=quality))


def started(rule: PlateauRule, rounds: int = 9) -> Run:
    run = Run(rounds=rounds)
    run.state = replace(run.state, policy=replace(run.state.policy, plateau=rule))
    run.on(AgentConnected("a"), AgentConnected("b"))
    return run


def test_a_run_without_progress_completes_early() -> None:
    run = started(PlateauRule(patience=2))
    for number, loss in enumerate((1.0, 0.8, 0.9, 0.85), 1):
        assert run.state.phase is Phase.TRAINING
        effects = round_of(run, number, Quality(1.0, loss=loss))
    assert run.state.phase is Phase.COMPLETED
    assert effects == (CloseRound(Quality(1.0, loss=0.85)), FinishRun())
    assert (run.state.completed, run.state.reason) == (4, None)


@pytest.mark.parametrize("quality", [None, Quality(training_loss=1.0)])
def test_rounds_that_nobody_measured_end_nothing(quality: Quality | None) -> None:
    run = started(PlateauRule(patience=1), rounds=5)
    for number in range(1, 6):
        round_of(run, number, quality)
    assert (run.state.phase, run.state.completed) == (Phase.COMPLETED, 5)


def test_a_restart_forgets_no_round_of_patience() -> None:
    run = started(PlateauRule(patience=2))
    for number, loss in enumerate((0.8, 0.8), 1):
        round_of(run, number, Quality(1.0, loss=loss))
    kept = msgspec.json.decode(msgspec.json.encode(run.state), type=RunState)
    assert kept == run.state
    run.state = kept
    round_of(run, 3, Quality(1.0, loss=0.8))
    assert run.state.phase is Phase.COMPLETED


def test_an_agent_that_tells_another_quality_has_diverged() -> None:
    run = started(PlateauRule())
    run.on(AgentConnected("c"))
    state = run.state
    run.state = replace(state, invited=frozenset("abc"))
    for agent in "abc":
        run.on(Ready(agent, 1, 3))
    for agent in "abc":
        run.on(Uploaded(agent, SHA))
    run.on(Stored(), *(Applied(agent, 1, SHA, quality=Quality(1.0, loss=1.0)) for agent in "ab"))
    effects = run.on(Applied("c", 1, SHA, quality=Quality(1.0, loss=0.1)))
    assert [effect.agent for effect in effects if hasattr(effect, "subject")] == ["c"]
    assert CloseRound(Quality(1.0, loss=1.0)) in effects
