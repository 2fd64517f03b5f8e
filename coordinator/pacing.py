"""When agents that are not needed come back: pace steering, as pure functions and fixed draws.

Source: Bonawitz et al., "Towards Federated Learning at Scale: System Design" (arXiv:1902.01046v2),
section 2.3. Agents of a small fleet are told to come together shortly before the next round, those
of a large one to come spread over time, as often as rounds need them and no more often. The paper
gives the aims and no formula; these are ours:

    rate  = min(MARGIN * wanted / round_seconds, ARRIVALS_PER_SECOND)     arrivals that are wanted
    mean  = enrolled / rate, MEAN_AWAY at most                             time between two visits
    away  = uniform(LEAST_AWAY, 2 mean - LEAST_AWAY)                       of one agent

The fleet keeps that rate by itself: whoever comes finds its place among the reserve or is sent away
for about `mean` again. Nobody leaves whom the next round may want: the reserve stays, unless the
open round is a long one; then it comes back before that ends.
"""

import math
import random
from collections.abc import Mapping, Set
from dataclasses import dataclass

from coordinator.selection import select

# What one coordinator takes beside its rounds: a stream costs it 2 ms of a core (benchmarks).
ARRIVALS_PER_SECOND = 200.0
MARGIN = 2.0  # arrivals for each agent wanted: some leave again, some do not suit
LEAST_AWAY_SECONDS = 60.0  # below, a connection that stays is cheaper
MEAN_AWAY_SECONDS = 43_200.0  # at most: devices live by days, and twice the mean is one
LONG_ROUND_SECONDS = 600.0  # what is left of a round for which the reserve leaves, too
FIRST_ROUND_SECONDS = 300.0  # supposed of a round before there was one
SLACK = 0.25  # part of a long round that is left when the first of the reserve are back


@dataclass(frozen=True)
class Fleet:
    """The agents that may come."""

    enrolled: int  # that are not banned
    streams: int  # that may be open at once

    @property
    def spread_seconds(self) -> int:
        """Seconds over which all who are connected spread their return after a restart."""
        return int(min(self.enrolled, self.streams) / ARRIVALS_PER_SECOND)


@dataclass(frozen=True)
class Need:
    """What a run wants of those who are connected and have nothing to do."""

    reserve: int  # that stay for the next round
    round_seconds: float  # from one round to the next, as it was last; 0: there was none
    seconds_left: float = 0.0  # of the open round, as far as can be told; 0: cannot be told
    patience_seconds: float = math.inf  # for which the run waits for agents before it fails


def mean_away(fleet: Fleet, need: Need) -> float:
    """Return the mean seconds between two visits of an agent at which enough come."""
    rate = MARGIN * max(1, need.reserve) / max(1.0, need.round_seconds or FIRST_ROUND_SECONDS)
    seconds = fleet.enrolled / min(rate, ARRIVALS_PER_SECOND)
    return min(seconds, MEAN_AWAY_SECONDS)


def surplus_away(fleet: Fleet, need: Need, waiting: int, draw: str) -> int:
    """Return for how many seconds an agent leaves that is not among the reserve; 0: it stays.

    `waiting` is how many have nothing to do. Where agents would be back at once they stay, as long
    as they take less than half of the streams.
    """
    mean = mean_away(fleet, need)
    if mean < LEAST_AWAY_SECONDS and 2 * waiting <= fleet.streams:
        return 0
    return _about(max(mean, LEAST_AWAY_SECONDS), draw)


def reserve_away(need: Need, draw: str) -> int:
    """Return for how many seconds one of the reserve leaves; 0: it stays.

    All are back when three quarters of the rest of the round have passed, so that one that ends
    sooner than the last finds many of them; and they come spread over the quarter before that. A
    round that has to be tried again finds them before the run's patience ends.
    """
    left = min(need.seconds_left, need.patience_seconds / 2)
    if left < LONG_ROUND_SECONDS:
        return 0
    chance = random.Random(draw).random()  # noqa: S311 - spreads, hides nothing
    return int(left * (1 - SLACK * (1 + chance)))


def dismissed(
    fleet: Fleet, need: Need, waiting: Set[str], able: Set[str], draw: str
) -> Mapping[str, int]:
    """Return for how many seconds each of those who have nothing to do leaves; 0: it stays.

    `able`: those of them who may be its reserve. Who was in the round before is not: it has had its
    turn, and a reserve that is the same for ever would be the whole fleet that ever trains.
    """
    kept = select(able & waiting, need.reserve, f"{draw}/reserve")
    return {
        agent: reserve_away(need, f"{draw}/{agent}")
        if agent in kept
        else surplus_away(fleet, need, len(waiting), f"{draw}/{agent}")
        for agent in sorted(waiting)
    }


def arrival(fleet: Fleet, need: Need, waiting: int, able: bool, draw: str) -> int:
    """Return for how many seconds an agent leaves again that has just come; 0: it stays.

    `waiting` counts it, and all others who have nothing to do; `able`: the next round may invite
    it.
    """
    if able and waiting <= need.reserve:
        return reserve_away(need, draw)
    return surplus_away(fleet, need, waiting, draw)


def refused_away(fleet: Fleet, draw: str) -> float:
    """Return the seconds after which an agent may try again that finds every stream taken."""
    mean = fleet.enrolled / ARRIVALS_PER_SECOND
    return _about(min(max(mean, LEAST_AWAY_SECONDS), MEAN_AWAY_SECONDS), draw)


def _about(mean: float, draw: str) -> int:
    chance = random.Random(draw).random()  # noqa: S311 - spreads, hides nothing
    # From little to twice the mean: whoever was sent away together comes back evenly from now on.
    return int(LEAST_AWAY_SECONDS + 2 * chance * (mean - LEAST_AWAY_SECONDS))
