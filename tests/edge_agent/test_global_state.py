"""The state on disk: theta and what belongs to it move together, and a half file costs nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.global_state import GlobalState, LastRound
from fedloom.adapters import Theta, write_adapter
from fedloom.plans import ADAPTER_FILE, Plan, PlanOrigin, TrainableTensor
from fedloom.quality import Quality
from fedloom.strategies import RULES, algorithm, update_length
from fedloom.tasks import TextClassification
from fedloom.terms import LocalTraining, Strategy
from tests.strategies.samples import ALL_TERMS, terms_of

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


def opened(folder: Path, terms: LocalTraining | None = None) -> GlobalState:
    """Open the state in a folder as a process does that was started again."""
    plan_folder = folder / "plan"
    plan_folder.mkdir(exist_ok=True, parents=True)
    write_adapter(plan_folder / ADAPTER_FILE, LAYOUT, INITIAL)
    return GlobalState(folder / "run", PLAN, plan_folder, terms or LocalTraining())


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


# what a strategy's server keeps


@pytest.mark.parametrize("terms", ALL_TERMS, ids=lambda terms: terms.strategy.name)
def test_all_that_a_server_keeps_is_there_again(tmp_path: Path, terms: LocalTraining) -> None:
    random, rule = np.random.default_rng(3), algorithm(terms)
    expected, digests = rule.init(INITIAL.copy()), set()
    for number in range(1, 4):
        mean = random.standard_normal(update_length(terms, LAYOUT)).astype(np.float32)
        expected = rule.apply(expected, mean.copy(), 3)
        state = opened(tmp_path, terms)
        state.apply(mean, 3, LastRound(number))
        again = opened(tmp_path, terms)
        assert again.server.rounds == number
        vectors = (expected.theta, *expected.vectors)
        for found, kept in zip((again.theta, *again.server.vectors), vectors, strict=True):
            assert found.tobytes() == kept.tobytes()
        assert again.sha256 == state.sha256
        digests.add(state.sha256)
    assert len(digests) == 3


def test_the_digest_is_of_what_the_server_keeps_too(tmp_path: Path) -> None:
    """Momenta that differ will show in theta a round later: better say so now."""
    terms = terms_of(Strategy.FED_AVG_M, server_learning_rate=0.0)
    digests = set()
    for seed in (1, 2):
        state = opened(tmp_path / str(seed), terms)
        state.apply(updates(seed), 3, LastRound(1))
        np.testing.assert_array_equal(state.theta, INITIAL)
        digests.add(state.sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("after", [terms.strategy for terms in ALL_TERMS], ids=lambda s: s.name)
def test_a_state_of_other_vectors_is_discarded(tmp_path: Path, after: Strategy) -> None:
    terms = terms_of(Strategy.FED_AVG_M)
    opened(tmp_path, terms).apply(updates(1), 3, LastRound(1))
    again = opened(tmp_path, terms_of(after))
    same = RULES[after].keeps == RULES[Strategy.FED_AVG_M].keeps
    assert again.last.round == (1 if same else 0)


def test_a_state_with_notes_of_another_version_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "run" / "after-round-1.safetensors"
    opened(tmp_path).apply(updates(1), 3, LastRound(1))
    header = path.read_bytes()
    notes = {"rounds": "1", "round": "1", "attempt": "0", "saturated": "0"}
    notes |= {"next_clip": (0.0).hex(), "opened_sha256": "", "quality": "null"}
    write_adapter(path, LAYOUT, updates(1), notes)
    assert path.read_bytes()[:60] == header[:60]
    assert opened(tmp_path).last.round == 1
    write_adapter(path, LAYOUT, updates(1), notes | {"staleness": "2"})
    assert opened(tmp_path).last.round == 0
    assert not path.exists()


def test_what_a_sum_said_of_quality_is_kept_to_the_bit(tmp_path: Path) -> None:
    told = LastRound(1, quality=Quality(0.1, 1 / 3, 2 / 3, 0.7, None, None))
    opened(tmp_path).apply(updates(1), 3, told)
    assert opened(tmp_path).last == told
