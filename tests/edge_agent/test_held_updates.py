"""An update that is held is there again, to the bit, until a sum has it: never in two."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.held_updates import HeldUpdate, HeldUpdates
from edge_agent.local_memory import SumPlace
from fedloom.secret_files import write_secret

RUN = bytes(range(16))
UPDATE = HeldUpdate(
    3,
    5,
    np.linspace(-1, 1, 40, dtype=np.float32),
    np.array([0.25, 1.0], np.float32),
    70,
    0.5,
    12.25,
)


def same(found: HeldUpdate | None, expected: HeldUpdate) -> bool:
    """Compare to the bit."""
    if found is None:
        return False
    arrays = found.values.tobytes() == expected.values.tobytes()
    arrays = arrays and found.shares.tobytes() == expected.shares.tobytes()
    numbers = (found.base_rounds, found.round, found.weight, found.mean_loss, found.seconds)
    return arrays and numbers == (
        expected.base_rounds,
        expected.round,
        expected.weight,
        expected.mean_loss,
        expected.seconds,
    )


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    HeldUpdates(tmp_path, RUN).keep(UPDATE)
    assert same(HeldUpdates(tmp_path, RUN).read(), UPDATE)
    assert HeldUpdates(tmp_path, RUN).proposed is None
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


@pytest.mark.parametrize("at", [0, 10, 30, 80, -1])
def test_a_damaged_file_is_no_update(tmp_path: Path, at: int) -> None:
    held = HeldUpdates(tmp_path, RUN)
    held.keep(UPDATE)
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert held.read() is None
    assert list(tmp_path.iterdir()) == []
    held.keep(UPDATE)
    path.write_bytes(path.read_bytes()[:at])
    assert held.read() is None
    assert HeldUpdates(tmp_path, bytes(16)).read() is None


def test_an_update_whose_place_is_lost_goes_nowhere_else(tmp_path: Path) -> None:
    held = HeldUpdates(tmp_path, RUN)
    held.keep(UPDATE)
    held.propose(SumPlace(6, 1, 0))
    write_secret(tmp_path / "held.place", b"{")
    assert held.proposed is None
    assert held.read() is None


# Whatever the run does with the places of one device's updates, and whenever its process dies.
_steps = st.lists(
    st.sampled_from(["send", "send again", "lose", "take", "die", "die after settling"]),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(steps=_steps)
def test_no_update_is_in_two_sums_and_none_that_was_sent_is_lost(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("held")
    held, made, counted, number = HeldUpdates(folder, RUN), 0, [], 1
    attempt = 1
    sent: int | None = None  # the update whose bytes are at the coordinator, for `number`
    for step in steps:
        found = held.read()
        if found is None:
            made += 1
            held.keep(HeldUpdate(0, made, UPDATE.values, UPDATE.shares, 1, 0.0, 0.0))
            found = held.read()
        assert found is not None
        match step:
            case "send" | "send again":
                attempt += step == "send again"  # the cohort is formed again
                held.propose(SumPlace(number, attempt, 2))
                sent = found.round
            case "lose" | "take":
                taken = step == "take" and sent is not None
                if taken:
                    assert sent is not None
                    counted.append(sent)
                held.settle(number, attempt, (0, 2, 5) if taken else (0, 5))
                number, attempt, sent = number + 1, 1, None
            case "die":
                held = HeldUpdates(folder, RUN)
            case "die after settling" if sent is not None:
                counted.append(sent)
                held.settle(number, attempt, (2,))
                held = HeldUpdates(folder, RUN)
                held.settle(number, attempt, (2,))  # the round is applied again from the history
                number, attempt, sent = number + 1, 1, None
        left = held.read()
        assert left is None or left.round not in counted
    assert len(counted) == len(set(counted))
    assert made - len(counted) in (0, 1)  # what is not in a sum is here
