"""What a device remembers moves with the stored sums: never twice, never ahead, never lost."""

import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.local_memory import LocalMemory, SumPlace, forget_memory
from fedloom.errors import Reason, Refused

RUN, P = bytes(range(16)), 5


def opened(folder: Path, count: int = 1) -> LocalMemory:
    """Open the memory as a process does that was started again."""
    return LocalMemory(folder, RUN, count, P)


def value(folder: Path) -> float:
    """Return what is remembered; all values of these tests' vectors are equal."""
    (vector,) = opened(folder).vectors()
    assert (vector.shape, vector.dtype) == ((P,), np.dtype(np.float32))
    assert (vector == vector[0]).all()
    return float(vector[0])


def proposal(number: float) -> tuple[np.ndarray]:
    return (np.full(P, number, np.float32),)


# What may happen to a device in a run: it proposes for a cohort, in which it has slot 1, or a round
# is finished, by this attempt, with or without it. Rounds are applied again after a crash.
_steps = st.lists(
    st.tuples(st.sampled_from(["propose", "finish with", "finish without", "again"]))
    | st.tuples(st.just("reattempt")),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(_steps)
def test_it_is_the_last_value_whose_update_is_in_a_sum(steps: list[tuple[str]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        expected, round_number, attempt = 0.0, 1, 1
        proposed: tuple[int, int, float] | None = None
        finished: list[tuple[int, int, tuple[int, ...]]] = []
        for count, (step,) in enumerate(steps, start=1):
            memory = opened(folder)  # every step in a process of its own
            if step == "propose":
                proposed = (round_number, attempt, float(count))
                memory.propose(SumPlace(round_number, attempt, 1), proposal(count))
            elif step == "reattempt":
                attempt += 1
            elif step == "again":
                for outcome in finished:
                    memory.settle(*outcome)
            else:
                slots = (0, 1, 4) if step == "finish with" else (0, 4)
                outcome = (round_number, attempt, slots)
                memory.settle(*outcome)
                finished.append(outcome)
                if proposed is not None and proposed[:2] == outcome[:2] and 1 in slots:
                    expected = proposed[2]
                proposed, round_number, attempt = None, round_number + 1, 1
            assert value(folder) == expected


def test_a_history_before_the_proposals_round_leaves_it(tmp_path: Path) -> None:
    """A state that is reset has all rounds applied anew, ours last."""
    opened(tmp_path).propose(SumPlace(7, 2, 1), proposal(3))
    for earlier in (1, 4, 6):
        opened(tmp_path).settle(earlier, 2, (0, 1))
    assert value(tmp_path) == 0
    opened(tmp_path).settle(7, 2, (0, 1))
    assert value(tmp_path) == 3


def test_a_void_rounds_proposal_is_dropped(tmp_path: Path) -> None:
    opened(tmp_path).propose(SumPlace(7, 1, 1), proposal(3))
    opened(tmp_path).settle(8, 1, (0, 1))
    opened(tmp_path).settle(7, 1, (0, 1))
    assert value(tmp_path) == 0


def test_files_are_their_owners_and_go_with_the_run(tmp_path: Path) -> None:
    opened(tmp_path).propose(SumPlace(1, 1, 0), proposal(1))
    opened(tmp_path).settle(1, 1, (0,))
    opened(tmp_path).propose(SumPlace(2, 1, 0), proposal(2))
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "memory.proposed"}
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    forget_memory(tmp_path)
    assert not list(tmp_path.iterdir())


def test_strategies_without_memory_leave_no_file(tmp_path: Path) -> None:
    memory = opened(tmp_path, count=0)
    memory.propose(SumPlace(1, 1, 0), ())
    memory.settle(1, 1, (0,))
    assert memory.vectors() == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["memory", "memory.proposed"])
def test_a_file_that_is_not_whole_is_declined_and_not_begun_anew(
    tmp_path: Path, where: str
) -> None:
    opened(tmp_path).propose(SumPlace(1, 1, 0), proposal(1))
    if where == "memory":
        opened(tmp_path).settle(1, 1, (0,))
    whole = (tmp_path / where).read_bytes()
    for position in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[position] ^= 1
        for content in (bytes(spoilt), whole[:position]):
            forget_memory(tmp_path)
            (tmp_path / where).write_bytes(content)
            opened(tmp_path).settle(1, 1, (0,))
            if not (tmp_path / "memory").exists():
                continue  # it was made another place's, or another attempt's
            with pytest.raises(Refused) as caught:
                opened(tmp_path).vectors()
            assert caught.value.reason is Reason.TRAINING_FAILED


def test_another_runs_memory_is_not_taken(tmp_path: Path) -> None:
    opened(tmp_path).propose(SumPlace(1, 1, 0), proposal(1))
    opened(tmp_path).settle(1, 1, (0,))
    with pytest.raises(Refused):
        LocalMemory(tmp_path, bytes(16), 1, P).vectors()
    with pytest.raises(Refused):
        LocalMemory(tmp_path, RUN, 1, P + 1).vectors()
