"""The owner's hours against a slow oracle, the power, and what a device tells of itself."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_agent.availability import DAYS, Availability, Window, on_battery, parse_window
from edge_agent.capability import (
    PACE_FILE,
    Pace,
    keep_pace,
    kept_pace,
    pace_of,
    told_capability,
)
from edge_agent.config import load_agent_config
from fedloom.errors import ConfigError
from fedloom.terms import LocalTraining

MONDAY = datetime(2026, 11, 16)
WEEK = 7 * 1440

_windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    st.integers(0, 95).map(lambda quarter: 15 * quarter),
    st.integers(1, 96).map(lambda quarter: 15 * quarter),
).filter(lambda window: window.start != window.end)
_hours = st.lists(_windows, min_size=1, max_size=4).map(lambda found: Availability(tuple(found)))
_minutes = st.integers(0, WEEK - 1)


def is_open(hours: Availability, minute: int) -> bool:
    """Look at every day on which a window may have begun, one by one."""
    for window in hours.windows:
        for days_ago in (0, 1):
            day = minute // 1440 - days_ago
            since = minute - day * 1440 - window.start
            end = window.end if window.end > window.start else window.end + 1440
            if day % 7 in window.days and 0 <= since < end - window.start:
                return True
    return False


@given(_hours, _minutes, st.integers(0, 59))
def test_hours_are_what_a_look_at_every_minute_says(
    hours: Availability, minute: int, second: int
) -> None:
    now = MONDAY + timedelta(minutes=minute, seconds=second)
    left, opens_in = hours.seconds_left(now), hours.opens_in(now)
    ahead = range(minute, minute + WEEK)
    if is_open(hours, minute):
        closes = next((m for m in ahead if not is_open(hours, m % WEEK)), minute + WEEK)
        assert left == 60 * (closes - minute) - second
        assert opens_in == 0
        assert hours.why_not(now) == ""
    else:
        opens = next(m for m in ahead if is_open(hours, m % WEEK))
        assert left is None
        assert opens_in == 60 * (opens - minute) - second
        assert "availability.windows" in hours.why_not(now)


@given(_hours, _minutes, st.floats(0, 1e5))
def test_a_fleet_with_the_same_hours_does_not_come_at_once(
    hours: Availability, minute: int, spread: float
) -> None:
    now = MONDAY + timedelta(minutes=minute)
    left = hours.seconds_left(now)
    assume(left is not None)
    assert left is not None
    delay = hours.opening_delay(now, spread)
    assert 0 <= delay <= min(spread, left / 4)


def test_who_states_no_hours_is_always_there() -> None:
    assert Availability().why_not(MONDAY) == ""
    assert Availability().seconds_left(MONDAY) is None
    assert Availability().opens_in(MONDAY) == 0


@given(_windows)
def test_a_window_is_read_as_it_is_written(window: Window) -> None:
    days = ",".join(DAYS[day] for day in sorted(window.days))
    times = "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (window.start, window.end))
    assert parse_window(f" {days.title()}  {times} ") == window


def test_days_may_be_spans_over_the_weekend_or_left_out() -> None:
    assert parse_window("fri-mon 08:00-09:30") == Window(frozenset({4, 5, 6, 0}), 480, 570)
    assert parse_window("22:00-06:00") == Window(frozenset(range(7)), 1320, 360)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8:00-9:00",
        "24:00-06:00",
        "08:00-08:00",
        "08:60-09:00",
        "08:00-24:01",
        "08:00-00:00",
        "xyz 08:00-09:00",
        "mon-tue-wed 08:00-09:00",
        "mon 08:00",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_window(text)


# power


def supply(folder: Path, name: str, **facts: str) -> None:
    (folder / name).mkdir()
    for fact, value in facts.items():
        (folder / name / fact).write_text(value + "\n")


def test_a_device_on_battery_waits_for_mains(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", status="Discharging")
    supply(tmp_path, "AC", type="Mains", online="0")
    assert on_battery(tmp_path)
    assert "mains" in Availability(needs_mains=True).why_not(MONDAY, tmp_path)
    assert Availability().why_not(MONDAY, tmp_path) == ""
    (tmp_path / "AC" / "online").write_text("1\n")
    assert not on_battery(tmp_path)
    assert Availability(needs_mains=True).why_not(MONDAY, tmp_path) == ""


def test_a_mouse_is_not_what_the_device_runs_on(tmp_path: Path) -> None:
    supply(tmp_path, "mouse", type="Battery", status="Discharging", scope="Device")
    assert not on_battery(tmp_path)
    assert not on_battery(tmp_path / "missing")


# the file


def config(folder: Path, text: str) -> Path:
    (folder / "rows.csv").write_text("text,label\n")
    (folder / "agent.toml").write_text(f'[data]\npath = "rows.csv"\n{text}')
    return folder


def test_hours_and_reticence_are_read(tmp_path: Path) -> None:
    text = '[availability]\nwindows = ["sat,sun 00:00-24:00"]\npower = "mains"\n'
    found = load_agent_config(config(tmp_path, f'{text}[policy]\ncapability = "withheld"\n'))
    assert found.availability == Availability((Window(frozenset({5, 6}), 0, 1440),), True)
    assert not found.tells_capability


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('windows = "22:00-06:00"', "availability.windows: expected texts"),
        ('windows = ["whenever"]', "availability.windows: expected"),
        ('power = "solar"', "availability.power: expected any or mains"),
        ("days = 3", "availability.days: expected one of"),
    ],
)
def test_what_is_wrong_with_hours_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_agent_config(config(tmp_path, f"[availability]\n{text}\n"))
    assert problem in caught.value.problem


# what is told


def is_power_of_two(figure: float) -> bool:
    return figure.hex().startswith("0x1.0000000000000p")


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9), st.integers(1, 1 << 49))
def test_figures_are_told_up_to_a_power_of_two(rate: float, seconds: float, memory: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_agent.capability.kept_pace", lambda home: Pace(rate, seconds))
        told = told_capability(Path(), "torch", memory)
    assert memory / 2 < told.memory_bytes <= memory
    assert told.memory_bytes & (told.memory_bytes - 1) == 0
    assert rate / 2 < told.samples_per_second <= rate
    assert is_power_of_two(told.samples_per_second)
    assert told.training_seconds == 1e9 or is_power_of_two(told.training_seconds)
    assert seconds <= told.training_seconds < 2 * seconds
    assert list(told.engines) == ["torch"]


@pytest.mark.parametrize(
    ("terms", "rows"),
    [
        (LocalTraining(epochs=3), 300),
        (LocalTraining(epochs=3, max_steps=4, batch_size=10), 40),
        (LocalTraining(local_steps=7, batch_size=10), 70),
    ],
)
def test_a_pace_counts_the_rows_that_training_went_through(terms: LocalTraining, rows: int) -> None:
    assert pace_of(terms, 100, 2.0) == Pace(rows / 2.0, 2.0)


def test_a_pace_outlives_the_process(tmp_path: Path) -> None:
    assert kept_pace(tmp_path) == Pace()
    keep_pace(tmp_path, Pace(12.5, 3.0))
    assert kept_pace(tmp_path) == Pace(12.5, 3.0)
    for foreign in ("", "[]", '{"x": 1}', '{"samples_per_second": -1, "training_seconds": 1}'):
        (tmp_path / PACE_FILE).write_text(foreign)
        assert kept_pace(tmp_path) == Pace()
