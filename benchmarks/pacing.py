"""A fleet of virtual devices through days of virtual time: who comes when, paced and not.

What the coordinator decides is the product's (`coordinator.pacing`, `coordinator.selection`), what
devices do with it is said by the same rules as `edge_agent`: hours with a delay at their beginning,
full jitter that doubles after every failure. Nothing else is: no bytes travel, a round is a draw.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator import pacing
from coordinator.pacing import Fleet, Need
from coordinator.selection import Selection, choose
from edge_agent.absence import FIRST_OPENING_SECONDS, MOST_SPREAD_SECONDS, OPENING_SECONDS
from edge_agent.session import FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS

HOUR, DAY = 3600, 86_400
STREAMS = 3840  # of the default 4,096 connections


@dataclass(frozen=True)
class World:
    """What is simulated; times in seconds."""

    devices: int = 1_000_000
    seconds: int = 3 * DAY
    size: int = 100
    over_selection: float = 1.3
    training_seconds: float = 240.0  # of a device in the middle; log-normal, sigma 0.4
    dropout: float = 0.08  # of the invited are never ready
    rollout_seconds: int = HOUR  # in which the devices are switched on for the first time
    restart_at: int = 2 * DAY - HOUR
    restart_seconds: int = 600
    with_hours: float = 0.7  # of the devices: eight hours a day, beginning in one of six time zones
    seed: int = 0


@dataclass
class Found:
    """What came out; peaks are the most arrivals in one second."""

    arrivals: int = 0
    rollout_peak: int = 0
    peak: int = 0  # after the rollout, without the hour after the restart
    mean: float = 0.0
    restart_peak: int = 0  # in the hour from the restart on
    most_connected: int = 0
    rounds: int = 0
    short_rounds: int = 0  # that began with fewer than they would invite, after the rollout
    longest_gap: int = 0  # seconds between two rounds
    served: int = 0  # devices that were invited at least once
    most_invitations: int = 0  # of one device
    busy: int = 0  # arrivals that found no free stream
    by_second: Counter[int] = field(default_factory=Counter, repr=False)


class PacedFleet:
    """The devices and their coordinator, second by second."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.found = Found()
        self._chance = random.Random(world.seed)  # noqa: S311
        self._selection = Selection(over_selection=world.over_selection)
        self._invitations = self._selection.invitations(world.size)
        self._fleet = Fleet(world.devices, STREAMS)
        self._calendar: defaultdict[int, list[int]] = defaultdict(list)
        generator = np.random.default_rng(world.seed)
        zones = generator.integers(0, 6, world.devices) * 4 * HOUR
        hours = generator.random(world.devices) < world.with_hours
        self._opens: NDArray[np.int32] = np.where(hours, zones, -1).astype(np.int32)
        self._failures: NDArray[np.int16] = np.zeros(world.devices, np.int16)
        self._away: NDArray[np.float32] = np.zeros(world.devices, np.float32)
        for device, at in enumerate(generator.integers(0, world.rollout_seconds, world.devices)):
            self._calendar[int(at)].append(device)
        self._leaves: defaultdict[int, list[int]] = defaultdict(list)  # ends of hours
        self._connected: set[str] = set()
        self._invited: frozenset[str] = frozenset()
        self._before: frozenset[str] = frozenset()
        self._number = 0
        self._began, self._ends, self._lasted, self._ended = 0, 0, 0.0, 0
        self._counts: Counter[str] = Counter()

    def run(self) -> Found:
        """Let the time pass."""
        world = self.world
        down = range(world.restart_at, world.restart_at + world.restart_seconds)
        for now in range(world.seconds):
            if now == world.restart_at:
                self._cut(now)
            for device in self._leaves.pop(now, ()):
                self._close(device, now)
            for device in self._calendar.pop(now, ()):
                self._knock(device, now, now in down)
            if now not in down:
                self._go_on(now)
            self.found.most_connected = max(self.found.most_connected, len(self._connected))
        return self._counted()

    # devices

    def _hours_left(self, device: int, now: int) -> int:
        """Return the seconds until the device's hours end; 0 outside them."""
        opens = int(self._opens[device])
        return DAY if opens < 0 else max(0, 8 * HOUR - (now - opens) % DAY)

    def _knock(self, device: int, now: int, is_down: bool) -> None:
        left = self._hours_left(device, now)
        if not left:
            self._wait_for_hours(device, now)
            return
        self.found.arrivals += 1
        self.found.by_second[now] += 1
        if is_down:
            self._back_off(device, now)
            return
        self._failures[device] = 0
        if len(self._connected) >= STREAMS:
            self.found.busy += 1
            wait = pacing.refused_away(self._fleet, f"{device}/{now}")
            self._come_back(device, now, wait * self._chance.uniform(1.0, 1.5))
            return
        self._connected.add(str(device))
        if self._opens[device] >= 0:
            self._leaves[now + left].append(device)
        if self._invited:
            waiting = len(self._connected - self._invited)
            away = pacing.arrival(self._fleet, self._need(now), waiting, True, f"{device}/{now}")
            if away:
                self._send_away(str(device), now, away)

    def _wait_for_hours(self, device: int, now: int) -> None:
        opens = (int(self._opens[device]) - now) % DAY
        away = float(self._away[device])
        spread = max(OPENING_SECONDS, away) if away else FIRST_OPENING_SECONDS
        most = min(8 * HOUR / 4, spread)
        self._come_back(device, now, opens + self._chance.uniform(0.0, most))

    def _close(self, device: int, now: int) -> None:
        """The hours are over: whoever is here declines and leaves."""
        if str(device) in self._connected and not self._hours_left(device, now):
            self._connected.discard(str(device))
            self._wait_for_hours(device, now)

    def _cut(self, now: int) -> None:
        """The coordinator goes away with all its streams."""
        for agent in sorted(self._connected):
            self._back_off(int(agent), now)
        self._connected.clear()
        self._invited = frozenset()

    def _back_off(self, device: int, now: int) -> None:
        longest = min(float(self._away[device]), MOST_SPREAD_SECONDS)
        # A device that was sent away knows the fleet: see `edge_agent.connection.Backoff.spread`.
        first = max(FIRST_BACKOFF_SECONDS, float(self._fleet.spread_seconds))
        most = max(LAST_BACKOFF_SECONDS, first, longest)
        failures = int(self._failures[device])
        self._failures[device] = failures + 1
        pause = min(first * 2.0 ** min(failures, 30), most)
        self._come_back(device, now, self._chance.uniform(0.0, pause))

    def _send_away(self, agent: str, now: int, away: int) -> None:
        self._connected.discard(agent)
        self._away[int(agent)] = away
        self._come_back(int(agent), now, away)

    def _come_back(self, device: int, now: int, seconds: float) -> None:
        self._calendar[now + max(1, round(seconds))].append(device)

    # rounds

    def _need(self, now: int) -> Need:
        left = max(0.0, self._began + self._lasted - now) if self._lasted else 0.0
        return Need(round(self._invitations * self._selection.reserve), self._lasted, left)

    def _go_on(self, now: int) -> None:
        if self._invited and now >= self._ends:
            self._lasted, self._ended = float(now - self._began), now
            self._invited = frozenset()
        if not self._invited and len(self._connected) >= self.world.size:
            self._begin(now)

    def _begin(self, now: int) -> None:
        world, found = self.world, self.found
        here = frozenset(self._connected)
        self._number += 1
        draw = f"{world.seed}/{self._number}"
        self._invited = choose(self._selection, here, {}, world.size, draw)
        self._counts.update(self._invited)
        if now > world.rollout_seconds:
            found.short_rounds += len(self._invited) < self._invitations
            if self._ended:
                found.longest_gap = max(found.longest_gap, now - self._ended)
        found.rounds += 1
        ready = sorted(
            world.training_seconds * self._chance.lognormvariate(0.0, 0.4)
            for _ in self._invited
            if self._chance.random() >= world.dropout
        )
        enough = ready[min(world.size, len(ready)) - 1] if ready else HOUR
        self._began, self._ends = now, now + max(1, round(enough))
        others = here - self._invited
        need, able = self._need(now), others - self._before
        self._before = self._invited
        for agent, away in pacing.dismissed(self._fleet, need, others, able, draw).items():
            if away:
                self._send_away(agent, now, away)

    def _counted(self) -> Found:
        found, world = self.found, self.world
        restart = range(world.restart_at, world.restart_at + world.restart_seconds + HOUR)
        calm = range(2 * world.rollout_seconds, world.seconds)
        found.rollout_peak = _peak(found.by_second, range(2 * world.rollout_seconds))
        found.restart_peak = _peak(found.by_second, restart)
        found.peak = _peak(found.by_second, (now for now in calm if now not in restart))
        found.mean = sum(found.by_second[now] for now in calm) / max(1, len(calm))
        found.served = len(self._counts)
        found.most_invitations = max(self._counts.values(), default=0)
        return found


def _peak(by_second: Counter[int], seconds: Iterable[int]) -> int:
    return max((by_second[now] for now in seconds), default=0)


def unpaced(world: World, seconds: int = 900) -> Found:
    """The same fleet without pacing: all want to be connected, all the time.

    Whoever finds no stream tries again, after pauses that double up to half a minute, between half
    of the pause and all of it. The coordinator is away from a third of the time on, for a sixth.
    """
    generator, found = np.random.default_rng(world.seed), Found()
    count = world.devices
    at = generator.uniform(0.0, 60.0, count)  # switched on
    pause = np.full(count, FIRST_BACKOFF_SECONDS)
    connected = np.zeros(count, bool)
    down = range(seconds // 3, seconds // 2)
    for now in range(seconds):
        if now == down.start:
            at[connected] = now + generator.uniform(0.5, 1.0, int(connected.sum())) * 0.2
            connected[:] = False
        due = np.flatnonzero(~connected & (at < now + 1))
        found.by_second[now] = len(due)
        if now not in down:
            admitted = due[: STREAMS - int(connected.sum())]
            connected[admitted] = True
            pause[admitted] = FIRST_BACKOFF_SECONDS
            due = due[len(admitted) :]
            found.busy += len(due)
        at[due] = now + np.maximum(1.0, pause[due] * generator.uniform(0.5, 1.0, len(due)))
        pause[due] = np.minimum(2 * pause[due], LAST_BACKOFF_SECONDS)
    found.arrivals = sum(found.by_second.values())
    found.rollout_peak = _peak(found.by_second, range(down.start))
    found.restart_peak = _peak(found.by_second, range(down.start, seconds))
    found.peak = _peak(found.by_second, range(240, down.start))
    found.mean = found.arrivals / seconds
    found.most_connected = STREAMS
    return found


def main() -> None:
    """Print what both fleets do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=World.devices)
    parser.add_argument("--days", type=float, default=World.seconds / DAY)
    parser.add_argument("--size", type=int, default=World.size)
    parser.add_argument("--seed", type=int, default=World.seed)
    options = parser.parse_args()
    seconds = int(options.days * DAY)
    restart_at = max(3 * HOUR, seconds * 2 // 3 - HOUR)
    world = World(options.devices, seconds, options.size, restart_at=restart_at, seed=options.seed)
    for name, found in (("without", unpaced(world)), ("with", PacedFleet(world).run())):
        figures = asdict(found)
        del figures["by_second"]
        print(json.dumps({"pacing": name, **figures}))


if __name__ == "__main__":
    main()
