"""How large parts are and how long an agent waits: laws, without a network."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import connection
from edge_agent.absence import MOST_AWAY_SECONDS, MOST_SPREAD_SECONDS
from edge_agent.connection import Backoff, Unreachable
from edge_agent.identity import Identity
from edge_agent.participation import Device
from edge_agent.session import Session
from fedloom.artifacts import (
    SENT_PART_BYTES,
    SMALLEST_PART_BYTES,
    next_part_bytes,
    read_parts,
)
from fedloom.channels import WINDOW_BYTES
from fedloom.errors import Reason, Refused
from fedloom.terms import Protection
from fedloom.v1 import control_pb2


@given(st.integers(0, 1 << 40), st.floats(0, 1e9))
def test_a_part_is_within_its_bounds(given_bytes: int, seconds: float) -> None:
    assert SMALLEST_PART_BYTES <= next_part_bytes(given_bytes, seconds) <= SENT_PART_BYTES


@pytest.mark.parametrize("rate", [2_000, 8_000, 50_000, 1_000_000, 100_000_000])
def test_a_part_takes_about_a_second_once_the_window_is_full(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "update.bin"
    path.write_bytes(bytes(16 * WINDOW_BYTES))
    now, given_bytes, settled = [0.0], 0, []
    for part in read_parts(path, clock=lambda: now[0]):
        if given_bytes >= 2 * WINDOW_BYTES:
            settled.append(len(part))
        given_bytes += len(part)
        # gRPC takes the next part when this one fits into the window beside what is under way.
        now[0] = max(now[0], (given_bytes - WINDOW_BYTES) / rate)
    assert given_bytes == 16 * WINDOW_BYTES
    expected = min(max(rate, SMALLEST_PART_BYTES), SENT_PART_BYTES)
    assert all(expected / 2 <= size <= expected * 2 for size in settled[:-1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    return now


_CUT = Unreachable("here", "a cut", hopeless=False)


def test_pauses_double_while_attempts_fail_at_once(clock: list[float]) -> None:
    backoff = Backoff(1.0, 8.0)
    for expected in (1, 2, 4, 8, 8, 8):
        backoff.attempt()
        assert 0 <= backoff.pause(_CUT) <= expected


def test_an_attempt_that_lasted_longer_than_the_pause_before_the_next_starts_anew(
    clock: list[float],
) -> None:
    backoff = Backoff(1.0, 8.0)
    for _ in range(100):  # a link that is cut every few seconds, for ever
        backoff.attempt()
        clock[0] += 3.0
        assert backoff.pause(_CUT) <= 1.0


def test_nobody_comes_back_sooner_than_it_was_told(clock: list[float]) -> None:
    backoff = Backoff(1.0, 8.0)
    pauses = set()
    for _ in range(20):
        backoff.attempt()
        pauses.add(backoff.pause(Refused(Reason.BUSY, "later", retry_after=60.0)))
    assert 60.0 <= min(pauses) < max(pauses) <= 90.0, "those told together come back apart"


def test_in_a_large_fleet_pauses_begin_longer_and_grow_longer(clock: list[float]) -> None:
    backoff = Backoff(1.0, 8.0)
    backoff.spread(20.0, 100.0)
    most = []
    for _ in range(6):
        backoff.attempt()
        most.append(max(_pauses(backoff)))
    for found, expected in zip(most, (20, 40, 80, 100, 100, 100), strict=True):
        assert 0.8 * expected < found <= expected


def test_a_fleet_that_became_small_is_patient_no_more(clock: list[float]) -> None:
    backoff = Backoff(1.0, 8.0)
    backoff.spread(20.0, 100.0)
    backoff.spread(0.0, 0.0)
    backoff.attempt()
    assert backoff.pause(_CUT) <= 1.0


def _pauses(backoff: Backoff) -> list[float]:
    """Return many draws of the pause that is next."""
    draws = [copy.copy(backoff).pause(_CUT) for _ in range(200)]
    backoff.pause(_CUT)
    return draws


async def test_no_coordinator_sends_a_device_away_for_ever(tmp_path: Path) -> None:
    device = Device(tmp_path, cast(Identity, None), Protection.PLAIN, cast(Any, None), None)
    session = Session(device, frozenset({Protection.PLAIN}))
    session._wait(control_pb2.Waiting(come_back_seconds=2**32 - 1, spread_seconds=2**32 - 1))
    assert session._absence.seconds == MOST_AWAY_SECONDS
    assert session._absence.spread_seconds == MOST_SPREAD_SECONDS
    session._wait(control_pb2.Waiting(cause=control_pb2.WAIT_CAUSE_GATHERING))
    assert session._absence.seconds == 0, "stay"
