"""A search over runs that are formulas: what it finds, what it stops, and that it goes on."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from fedloom.errors import ConfigError, Reason, Refused
from simulation.search import Rules, Search
from simulation.search_folder import alone_in
from simulation.space import Choice, Interval, Value
from simulation.trials import State, Trial, Unfit

SPACE = {
    "x": Interval(0.0, 1.0, whole=False),
    "y": Interval(1e-4, 1.0, whole=False, log=True),
    "z": Choice(("good", "bad", "impossible")),
}
ROUNDS = 6


class Killed(BaseException):
    """What a process does not survive."""


class Formula:
    """A run whose loss falls with the rounds towards (x - 0.3)^2 + a penalty."""

    def __init__(self, world: "World", number: int, parameters: Mapping[str, Value]) -> None:
        self._world = world
        self._number = number
        x, y = float(parameters["x"]), float(parameters["y"])
        self._floor = (x - 0.3) ** 2 + abs(y - 0.01) / 0.1 + 0.2 * (parameters["z"] == "bad")

    @property
    def values(self) -> Sequence[float]:
        return [self._floor + 0.5 / n for n in range(1, self._world.rounds[self._number] + 1)]

    @property
    def finished(self) -> bool:
        return self._world.rounds[self._number] == ROUNDS

    def advance(self) -> None:
        self._world.live()
        if self._number == self._world.fails:
            raise Refused(Reason.TRAINING_FAILED, "expected a finite update")
        self._world.rounds[self._number] += 1
        self._world.live()

    def close(self, kept: bool) -> None:
        if not kept:
            self._world.closed.append(self._number)


class World:
    """What outlives a process: the rounds of each trial. Dies after `lives` events."""

    def __init__(self, lives: int = 1 << 30, fails: int = 0) -> None:
        self.rounds: dict[int, int] = {}
        self.closed: list[int] = []
        self.lives = lives
        self.fails = fails

    def live(self) -> None:
        self.lives -= 1
        if self.lives == 0:
            raise Killed

    def begin(self, number: int, parameters: Mapping[str, Value]) -> Formula:
        self.live()
        if parameters["z"] == "impossible":
            raise Unfit("z: expected something possible")
        self.rounds.setdefault(number, 0)
        return Formula(self, number, parameters)

    def tell(self, trial: Trial) -> None:
        self.live()


def search(folder: Path, pruner: str = "median", seed: int = 0, first=None) -> Search:
    folder.mkdir(exist_ok=True)
    return Search(folder, SPACE, Rules(rises=False, pruner=pruner, seed=seed), {"s": seed}, first)


def timeless(found: Search) -> list[tuple[object, ...]]:
    return [(t.number, t.state, t.parameters, t.values, t.reason) for t in found.trials]


@pytest.mark.parametrize("seed", range(3))
def test_a_known_optimum_is_found(tmp_path: Path, seed: int) -> None:
    """By chance 60 trials meet the region once in 6 searches, and these three once in 250."""
    found, world = search(tmp_path, seed=seed), World()
    found.conduct(world.begin, 60)
    best = found.best
    assert best is not None
    floor = best.values[-1] - 0.5 / ROUNDS
    # |x - 0.3| < 0.14 is 2/7, |y - 0.01| < 0.002 is 1/23 of the decades, 2/3 of that box are below
    # the bound, z is 1/3: the region is a 360th of the space.
    assert floor < 0.02
    assert best.parameters["z"] == "good"


def test_what_is_stopped_is_what_the_median_says(tmp_path: Path) -> None:
    found, world = search(tmp_path), World()
    found.conduct(world.begin, 40)
    finished: list[Trial] = []
    for trial in found.trials:
        assert world.rounds.get(trial.number, 0) == len(trial.values)  # no round is wasted
        if trial.state is State.REFUSED:
            assert trial.values == ()
            continue
        poor = [
            len(finished) >= 4 and min(trial.values[:n]) > _median(finished, n)
            for n in range(1, min(len(trial.values), ROUNDS - 1) + 1)
        ]
        assert poor.count(True) == (trial.state is State.STOPPED)
        if trial.state is State.STOPPED:
            assert poor[-1]
            assert f"after round {len(trial.values)} is poor" in trial.reason
        else:
            assert len(trial.values) == ROUNDS
            finished.append(trial)
    states = [trial.state for trial in found.trials]
    assert states.count(State.STOPPED) >= 10
    assert sum(world.rounds.values()) < 0.7 * ROUNDS * (40 - states.count(State.REFUSED))
    assert sorted(world.closed) == sorted(world.rounds)


def _median(finished: Sequence[Trial], rounds: int) -> float:
    return statistics.median(trial.values[rounds - 1] for trial in finished)


def test_without_a_pruner_every_run_is_whole(tmp_path: Path) -> None:
    found, world = search(tmp_path, "none"), World()
    found.conduct(world.begin, 12)
    assert {len(t.values) for t in found.trials if t.state is not State.REFUSED} == {ROUNDS}


@pytest.mark.parametrize(("jobs", "pruner"), [(1, "median"), (3, "median"), (1, "asha")])
def test_a_killed_search_goes_on_to_the_same_end(tmp_path: Path, jobs: int, pruner: str) -> None:
    whole, world = search(tmp_path / "whole", pruner), World(lives=1 << 30)
    whole.conduct(world.begin, 16, jobs, tell=world.tell)
    events = (1 << 30) - world.lives
    lives = itertools.cycle((7, 3, 12, 5, 2, 9, 4))
    cut, kills = World(lives=next(lives)), 0
    while True:
        found = search(tmp_path / "cut", pruner)
        try:
            found.conduct(cut.begin, 16, jobs, tell=cut.tell)
            break
        except Killed:
            kills += 1
            cut.lives = next(lives)
            if kills > 4 * events:  # deaths by the beginning of each process are no progress
                cut.lives = 1 << 30
    assert kills >= 8
    assert timeless(found) == timeless(whole)
    assert cut.rounds == world.rounds


def test_jobs_do_not_change_what_a_trial_is(tmp_path: Path) -> None:
    """The first proposals follow from the seed alone, however many are made at a time."""
    alone, three = search(tmp_path / "alone", "none"), search(tmp_path / "three", "none")
    alone.conduct(World().begin, 9)
    three.conduct(World().begin, 9, jobs=3)
    assert timeless(alone) == timeless(three)
    other = search(tmp_path / "other", "none", seed=1)
    other.conduct(World().begin, 9)
    assert timeless(other) != timeless(alone)


def test_a_search_pauses_and_is_extended(tmp_path: Path) -> None:
    found, world = search(tmp_path), World()
    asked = iter([False] * 9 + [True] * 9)
    found.conduct(world.begin, 5, stop=lambda: next(asked))
    assert [trial.state for trial in found.trials].count(State.OPEN) == 1
    found.conduct(world.begin, 5)
    found.conduct(world.begin, 8)
    whole = search(tmp_path / "whole")
    whole.conduct(World().begin, 8)
    assert timeless(found) == timeless(whole)


def test_what_fails_in_training_is_a_trial_with_its_reason(tmp_path: Path) -> None:
    first = {"x": 0.3, "y": 0.01, "z": "good"}
    found, world = search(tmp_path, first=first), World(fails=1)
    found.conduct(world.begin, 3)
    assert found.trials[0].parameters == first
    assert found.trials[0].state is State.REFUSED
    assert "expected a finite update" in found.trials[0].reason
    assert world.closed[0] == 1


def test_another_search_is_kept_out(tmp_path: Path) -> None:
    search(tmp_path)
    with pytest.raises(ConfigError, match="found another's"):
        search(tmp_path, seed=1)
    with (
        alone_in(tmp_path),
        pytest.raises(ConfigError, match="no other search"),
        alone_in(tmp_path),
    ):
        pass
    with pytest.raises(ConfigError, match="pruner"):
        Rules(rises=True, pruner="hyperband")
