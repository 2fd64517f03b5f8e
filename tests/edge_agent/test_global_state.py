"""The state on disk: theta and what belongs to it move together, and a half file costs nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.global_state import GlobalState, LastRound
from fedloom.adapters import Theta, write_adapter
from fedloom.plans import ADAPTER_FILE, Plan, PlanOrigin, TextClassification, TrainableTensor
from fedloom.terms import LocalTraining

LAYOUT = (TrainableTensor("weight", (3, 4), 0), TrainableTensor("bias", (5,), 12))
SIZE = 17
PLAN = Plan("toy", (), LAYOUT, TextClassification(("no", "yes"), 16, 0), PlanOrigin("none"))
INITIAL = np.linspace(-1, 1, SIZE, dtype=np.float32)

rounds = st.builds(
    LastRound,
    attempt=st.integers(1, (1 << 16) - 1),
    saturated=st.integers(0, 1 << 40),
    next_clip=st.floats(0, 1e20),
    opened_sha256=st.sampled_from([b"", bytes(range(32))]),
)


def opened(folder: Path) -> GlobalState:
    """Open the state in a folder as a process does that was started again."""
    plan_folder = folder / "plan"
    plan_folder.mkdir(exist_ok=True, parents=True)
    write_adapter(plan_folder / ADAPTER_FILE, LAYOUT, INITIAL)
    return GlobalState(folder / "run", PLAN, plan_folder, LocalTraining())


def updates(seed: int) -> Theta:
    """Draw a mean update."""
    drawn: Theta = np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)
    return drawn


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(rounds, st.integers(1, 1000), st.booleans()), max_size=6))
def test_what_was_applied_is_there_again_after_any_restart(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[LastRound, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("state")
    state, theta, last = opened(folder), INITIAL, LastRound()
    for seed, (applied, gap, restart) in enumerate(steps):
        last = replace(applied, round=last.round + gap)
        state.apply(updates(seed), 1, last)
        theta = theta + updates(seed)
        if restart:
            state = opened(folder)
        assert state.last == last
        np.testing.assert_array_equal(state.theta, theta)
        assert len(list((folder / "run").iterdir())) == 1
    assert opened(folder).sha256 == state.sha256


def test_a_round_that_was_cut_while_it_was_written_is_not_there(tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.apply(updates(1), 1, LastRound(1, next_clip=0.5))
    (tmp_path / "run" / "after-round-2.safetensors.part").write_bytes(b"half")
    assert opened(tmp_path).last == LastRound(1, next_clip=0.5)


@pytest.mark.parametrize("content", [b"", b"half a file", bytes(500)])
def test_a_file_that_is_not_whole_is_discarded(tmp_path: Path, content: bytes) -> None:
    state = opened(tmp_path)
    state.apply(updates(1), 1, LastRound(1, next_clip=0.5))
    broken = tmp_path / "run" / "after-round-2.safetensors"
    broken.write_bytes(content)
    again = opened(tmp_path)
    assert again.last.round == 1
    assert not broken.exists()


def test_without_a_whole_file_the_state_is_the_plans(tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.apply(updates(1), 1, LastRound(3))
    [kept] = (tmp_path / "run").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    again = opened(tmp_path)
    assert again.last == LastRound()
    np.testing.assert_array_equal(again.theta, INITIAL)


def test_the_newest_of_two_files_counts(tmp_path: Path) -> None:
    """A process that was killed after the rename has not deleted the older file."""
    state = opened(tmp_path)
    state.apply(updates(1), 1, LastRound(9))
    older = (tmp_path / "run" / "after-round-9.safetensors").read_bytes()
    state.apply(updates(2), 1, LastRound(10))
    (tmp_path / "run" / "after-round-9.safetensors").write_bytes(older)
    assert opened(tmp_path).last.round == 10


def test_a_reset_state_is_the_plans_for_good(tmp_path: Path) -> None:
    state = opened(tmp_path)
    state.apply(updates(1), 1, LastRound(4, next_clip=0.25))
    state.reset()
    for found in (state, opened(tmp_path)):
        assert found.last == LastRound()
        np.testing.assert_array_equal(found.theta, INITIAL)
