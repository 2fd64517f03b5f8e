"""What `coordinator.pacing` needs to know, and what agents are told of when to come back."""

import time
from collections.abc import Callable, Mapping, Set

from coordinator import pacing
from coordinator.pacing import Fleet, Need
from coordinator.run_state import Phase, RunState
from coordinator.selection import Pacing, eligible

COUNT_SECONDS = 60.0  # how old the number of enrolled agents may be


class Steering:
    """Paces the agents of one coordinator."""

    def __init__(
        self,
        count_enrolled: Callable[[], int],
        streams: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`streams`: how many agents can be connected at once."""
        self._count = count_enrolled
        self._streams = streams
        self._clock = clock
        self._counted_at = -COUNT_SECONDS
        self._enrolled = 0

    @property
    def fleet(self) -> Fleet:
        """The agents that may come."""
        if self._clock() - self._counted_at >= COUNT_SECONDS:
            self._counted_at, self._enrolled = self._clock(), self._count()
        return Fleet(self._enrolled, self._streams)

    def dismissed(self, waiting: Set[str], state: RunState, now: float) -> Mapping[str, int]:
        """Return for how many seconds each of those leaves whom a round has not invited."""
        if not _is_paced(state):
            return dict.fromkeys(waiting, 0)
        able = _able(state, waiting, now) - (state.recent[-1] if state.recent else frozenset())
        return pacing.dismissed(self.fleet, _need(state, now), waiting, able, _draw(state))

    def arrival(self, agent: str, state: RunState, now: float) -> int:
        """Return for how many seconds an agent leaves that came and is not needed now."""
        able = bool(_able(state, {agent}, now))
        wanted = able and state.phase is Phase.GATHERING and not state.paused
        if not _is_paced(state) or wanted or agent in state.invited:
            return 0
        waiting = len(state.connected - state.invited)
        draw = f"{_draw(state)}/{agent}"
        return pacing.arrival(self.fleet, _need(state, now), waiting, able, draw)

    def without_run(self, agent: str, connected: int) -> int:
        """Return for how many seconds an agent leaves while no run is open for it."""
        fleet = self.fleet
        if 2 * connected <= fleet.streams:
            return 0
        return int(pacing.refused_away(fleet, f"{agent}/{self._clock()}"))

    def refused(self, agent: str) -> float:
        """Return the seconds after which an agent may try again that finds no free stream."""
        return pacing.refused_away(self.fleet, f"{agent}/{self._clock()}")


def _is_paced(state: RunState) -> bool:
    """An asynchronous run wants everybody: who has nothing to do trains on, or waits for a key."""
    policy = state.policy
    return policy.selection.pacing is Pacing.STEERED and not policy.is_asynchronous


def _need(state: RunState, now: float) -> Need:
    policy = state.policy
    invited = policy.selection.invitations(policy.cohort_size)
    lasted = state.round_seconds
    left = max(0.0, state.began + lasted - now) if lasted else 0.0
    reserve = round(invited * policy.selection.reserve)
    return Need(reserve, lasted, left, policy.gathering_seconds)


def _able(state: RunState, agents: Set[str], now: float) -> frozenset[str]:
    """Return whom of these the round after the open one may invite."""
    rounds = (*state.recent, state.invited)
    return eligible(state.policy.selection, agents, state.traits, rounds, now)


def _draw(state: RunState) -> str:
    return f"{state.policy.seed}/{state.round}/{state.failures}/away"
