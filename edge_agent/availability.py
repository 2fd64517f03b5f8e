"""When this device takes part: the owner's hours, and whether it may run on its battery.

Hours are local wall-clock times. Where clocks are moved, an end may be said an hour wrong; it is
looked at again every minute, by the clock as it is then.
"""

import random
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY, _WEEK = 1440, 7 * 1440  # minutes
_POWER = Path("/sys/class/power_supply")
_WINDOW = re.compile(
    r"(?:(?P<days>[a-z]{3}(?:[,-][a-z]{3})*) +)?"
    r"(?P<from>\d\d):(?P<from_minute>[0-5]\d)-(?P<to>\d\d):(?P<to_minute>[0-5]\d)"
)
EXPECTED = 'expected "[DAYS ]HH:MM-HH:MM" such as "22:00-06:00" or "sat,sun 00:00-24:00"'


@dataclass(frozen=True)
class Window:
    """A time of some days; one that ends before it begins ends on the day after."""

    days: frozenset[int]  # on which it begins; 0: Monday
    start: int  # minutes of the day, 0..1439
    end: int  # 1..1440

    @property
    def length(self) -> int:
        """Return minutes."""
        return self.end - self.start if self.end > self.start else self.end + _DAY - self.start


def parse_window(text: str) -> Window:
    """Return the window that an owner wrote; raises ValueError that says what was expected."""
    found = _WINDOW.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{EXPECTED}, found {text!r}")
    start = 60 * int(found["from"]) + int(found["from_minute"])
    end = 60 * int(found["to"]) + int(found["to_minute"])
    if start >= _DAY or not 0 < end <= _DAY or start == end:
        raise ValueError(f"{EXPECTED}, found {text!r}")
    return Window(_days(found["days"], text), start, end)


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        names = part.split("-")
        if len(names) > 2 or any(name not in DAYS for name in names):
            raise ValueError(f"{EXPECTED}, days of {list(DAYS)}, found {whole!r}")
        first, last = DAYS.index(names[0]), DAYS.index(names[-1])
        found |= {(first + i) % 7 for i in range((last - first) % 7 + 1)}
    return frozenset(found)


@dataclass(frozen=True)
class Availability:
    """What the owner allows; no windows: any time."""

    windows: tuple[Window, ...] = ()
    needs_mains: bool = False

    def why_not(self, now: datetime, power: Path = _POWER) -> str:
        """Return why this device takes no part at this local time; "" when it does."""
        if self.windows and self.seconds_left(now) is None:
            return "outside the hours of availability.windows in agent.toml"
        if self.needs_mains and on_battery(power):
            return 'on battery, and agent.toml says availability.power = "mains"'
        return ""

    def seconds_left(self, now: datetime) -> float | None:
        """Return the seconds until the hours end; None outside them, and where there are none.

        Windows that meet or overlap are one. Hours without an end last a week at a time.
        """
        minute = _minute_of_week(now)
        end, grown = minute, True
        while grown and end - minute < _WEEK:
            ends = [end + left for window in self.windows if (left := _left(window, end % _WEEK))]
            grown = bool(ends)
            end = max(ends, default=end)
        if end == minute:
            return None
        return min(end - minute, _WEEK) * 60.0 - now.second

    def opens_in(self, now: datetime) -> float:
        """Return the seconds until a window begins; 0 inside one, and without any."""
        if not self.windows or self.seconds_left(now) is not None:
            return 0.0
        minute = _minute_of_week(now)
        starts = [day * _DAY + window.start for window in self.windows for day in window.days]
        return min((start - minute) % _WEEK for start in starts) * 60.0 - now.second

    def opening_delay(self, now: datetime, spread_seconds: float) -> float:
        """Return the seconds to wait, at random, after this device may take part again.

        So a fleet with the same hours does not come in the same second. Never above the spread, nor
        a quarter of what is left of the hours.
        """
        left = self.seconds_left(now)
        most = spread_seconds if left is None else min(left / 4, spread_seconds)
        return random.uniform(0.0, most)  # noqa: S311 - spreads a fleet


ALWAYS = Availability()


def _left(window: Window, minute: int) -> int:
    """Return the minutes until the window's end; 0 outside it. `minute` is of the week."""
    for day in window.days:
        passed = (minute - day * _DAY - window.start) % _WEEK
        if passed < window.length:
            return window.length - passed
    return 0


def _minute_of_week(now: datetime) -> int:
    return now.weekday() * _DAY + now.hour * 60 + now.minute


def local_now() -> datetime:
    """Return the wall clock's time here."""
    return datetime.now()


def on_battery(power: Path = _POWER) -> bool:
    """Whether the device runs on a battery; False where the system does not tell (only Linux does).

    It does if a battery is there that feeds the system and no mains supply is online.
    """
    battery = False
    try:
        supplies = sorted(power.iterdir())
    except OSError:
        return False
    for supply in supplies:
        kind = _read(supply / "type")
        if kind in ("Mains", "USB", "Wireless") and _read(supply / "online") not in ("", "0"):
            return False
        system = _read(supply / "scope") != "Device"  # else it is a mouse's
        battery |= kind == "Battery" and system and _read(supply / "status") == "Discharging"
    return battery


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
