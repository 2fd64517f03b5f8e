"""Clients trained by actors of Ray, on this machine or a cluster. Only `--engine ray` imports this.

As `processes`: group g goes to actor g mod n, two at most at a time, and what comes back is taken
in the order of the groups, so that a cluster computes what one process does. Ray has its own way of
sending objects; it is the operator's own cluster, and no agent ever speaks to it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedloom.errors import ConfigError
from fedloom.strategies import ServerState
from fedloom.terms import LocalTraining
from simulation.movers import Mover, Outcome, Task, train

try:
    import ray
except ImportError as error:
    raise ConfigError("engine", 'expected Ray: pip install "fedloom[sim]"') from error

_DEPTH = 2  # groups that an actor has at a time


class RayCrew:
    """See Crew; `address` is that of an existing cluster, or empty for a local one.

    The data and the model travel to every actor once, with `make`.
    """

    def __init__(
        self, make: Callable[[], Mover], group: int, workers: int, address: str = ""
    ) -> None:
        self._group = group
        self._ours = not ray.is_initialized()
        if self._ours:
            local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
            ray.init(address=address or None, log_to_driver=False, **({} if address else local))
        made = ray.put(make)
        actor: Any = ray.remote(_Worker)
        self._actors = [actor.options(num_cpus=1).remote([made]) for _ in range(workers)]
        self._round: Any = None

    @property
    def group(self) -> int:
        """See Crew."""
        return self._group

    def begin(self, state: ServerState, terms: LocalTraining) -> None:
        """See Crew."""
        self._round = ray.put((state, terms))

    def trained(self, groups: Iterator[Sequence[Task]]) -> Iterator[list[Outcome]]:
        """See Crew."""
        under_way: deque[Any] = deque()
        for number, tasks in enumerate(groups):
            if len(under_way) == _DEPTH * len(self._actors):
                yield ray.get(under_way.popleft())
            actor = self._actors[number % len(self._actors)]
            under_way.append(actor.train.remote(list(tasks), self._round))
        while under_way:
            yield ray.get(under_way.popleft())

    def close(self) -> None:
        """See Crew; a cluster that was here before stays."""
        for actor in self._actors:
            ray.kill(actor)
        if self._ours:
            ray.shutdown()


class _Worker:
    """One actor."""

    def __init__(self, made: list[Any]) -> None:
        self._mover: Mover = ray.get(made[0])()

    def train(
        self, tasks: list[Task], of_round: tuple[ServerState, LocalTraining]
    ) -> list[Outcome]:
        """Train a group."""
        return train(self._mover, tasks, *of_round)
