"""A search for the best run file: Optuna proposes, runs are conducted, poor ones end early.

    study ──ask──▶ a batch of `jobs` trials ──▶ each begins its run
      ▲                 │ a round of each, at once
      │                 ▼
      └──tell── after each round: pruner ──▶ stopped, or on to the next one

Trial n's proposal follows from the search's seed, n, and the trials that ended before its batch; a
batch moves in step, and its finished trials are told when all of it has ended. So equal seeds and
`jobs` give equal trials, however long a run takes and whoever kills the process: what is here when
it starts again are the study's file and the runs' own folders, and both go on.

Proposals: tree-structured Parzen estimators (Bergstra et al., 2011), all dimensions together.
Stopping: "median" of the finished trials after as many rounds (Golovin et al., Vizier, 2017,
section 3.2.2), or "asha", the best third at each rung (Li et al., arXiv:1810.05934, Algorithm 2).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError, Refused
from simulation.search_folder import STUDY_FILE, require_same, whole_lines
from simulation.space import Choice, Dimension, Space, Value
from simulation.trials import Begin, Candidate, State, Trial, Unfit

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise ConfigError("tune", 'expected Optuna: pip install "fedloom[sim]"') from error

PRUNERS = ("median", "asha", "none")
_RANDOM_TRIALS = 10  # before proposals are made of what was found
_UNSTOPPED_TRIALS = 4  # finished ones before "median" stops any
_REASON = "reason"


@dataclass(frozen=True)
class Rules:
    """How is searched: what it is that makes one file better, and what is stopped."""

    rises: bool  # whether more is better
    pruner: str = "median"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pruner not in PRUNERS:
            raise ConfigError("pruner", f"expected one of {PRUNERS}, found {self.pruner!r}")


class Search:
    """A search that is kept in a folder; `identity` is what it follows from, and is compared.

    `first`: values for all dimensions that are tried before any proposal.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        rules: Rules,
        identity: Mapping[str, Any],
        first: Mapping[str, Value] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        require_same(folder, identity)
        self._rules = rules
        self._distributions = {key: _distribution(found) for key, found in space.items()}
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(whole_lines(folder / STUDY_FILE)))),
            study_name="tune",
            direction="maximize" if rules.rises else "minimize",
            pruner=_pruner(rules.pruner),
            load_if_exists=True,
        )
        if first is not None and not self._study.trials:
            self._study.enqueue_trial(dict(first))

    @property
    def trials(self) -> list[Trial]:
        """All trials so far, in the order in which they were proposed."""
        return [_trial(n, frozen) for n, frozen in enumerate(self._counted(), 1)]

    @property
    def best(self) -> Trial | None:
        """The best finished trial, the earliest of equal ones."""
        ended = [trial for trial in self.trials if trial.state is State.FINISHED]
        sign = -1.0 if self._rules.rises else 1.0
        return min(ended, key=lambda trial: sign * trial.values[-1], default=None)

    def conduct(
        self,
        begin: Begin,
        count: int,
        jobs: int = 1,
        stop: Callable[[], bool] = lambda: False,
        tell: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        """Go on until there are `count` trials, or until `stop`, asked before each round."""
        self._drop_half_proposed()
        with ThreadPoolExecutor(jobs) as pool:
            while not stop():
                batch = self._batch(count, jobs)
                if not batch:
                    return
                _Batch(self._study, batch, begin, tell).conduct(pool, stop)

    def _counted(self) -> list[FrozenTrial]:
        uncounted = (TrialState.FAIL, TrialState.WAITING)
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state not in uncounted
        ]

    def _drop_half_proposed(self) -> None:
        """Propose anew what a process that died had not proposed to the end."""
        for frozen in self._counted():
            if (
                not frozen.state.is_finished()
                and frozen.params.keys() != self._distributions.keys()
            ):
                self._study.tell(frozen.number, state=TrialState.FAIL)

    def _batch(self, count: int, jobs: int) -> list[tuple[int, optuna.Trial]]:
        """Return the trials under way, and new ones up to a multiple of `jobs`."""
        known = self._counted()
        batch = [
            (number, optuna.Trial(self._study, frozen._trial_id))
            for number, frozen in enumerate(known, 1)
            if not frozen.state.is_finished()
        ]
        done = len(known)
        end = done if batch and done % jobs == 0 else min(count, (done // jobs + 1) * jobs)
        for number in range(done + 1, end + 1):
            # A sampler of its own for each trial: one that is made again after a kill would
            # otherwise propose again what it proposed first.
            text = f"{self._rules.seed}/trial/{number}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=_RANDOM_TRIALS
            )
            batch.append((number, self._study.ask(self._distributions)))
        return batch


class _Batch:
    """Trials that move in step."""

    def __init__(
        self,
        study: optuna.Study,
        batch: Sequence[tuple[int, optuna.Trial]],
        begin: Begin,
        tell: Callable[[Trial], None],
    ) -> None:
        self._study = study
        self._tell = tell
        self._numbers = {trial.number: number for number, trial in batch}
        self._candidates: list[tuple[optuna.Trial, Candidate]] = []
        for number, trial in batch:
            try:
                self._candidates.append((trial, begin(number, trial.params)))
            except Unfit as unfit:
                self._refuse(trial, str(unfit))

    def conduct(self, pool: ThreadPoolExecutor, stop: Callable[[], bool]) -> None:
        """Conduct the trials to their ends; where `stop` says so they stay open."""
        left = self._candidates
        finished: list[tuple[optuna.Trial, Candidate]] = []
        try:
            for trial, candidate in left:
                _report(trial, candidate)  # what a process before this one had no time to
            while left := [pair for pair in left if self._goes_on(*pair, finished)]:
                if stop():
                    return
                for pair, problem in zip(left, pool.map(_advanced, left), strict=True):
                    if problem:
                        self._refuse(pair[0], problem)
                        pair[1].close(kept=False)
                    else:
                        _report(*pair)
                left = [pair for pair in left if not self._is_told(pair[0])]
            # Not earlier: the others of the batch would be measured by these, or not, depending on
            # when a process is killed.
            for trial, candidate in finished:
                self._end(trial, TrialState.COMPLETE, candidate.values[-1])
                candidate.close(kept=False)
        finally:
            for trial, candidate in self._candidates:
                if not self._is_told(trial):
                    candidate.close(kept=True)

    def _goes_on(
        self,
        trial: optuna.Trial,
        candidate: Candidate,
        finished: list[tuple[optuna.Trial, Candidate]],
    ) -> bool:
        if candidate.finished:
            finished.append((trial, candidate))
            return False
        if not candidate.values or not trial.should_prune():
            return True
        value, rounds = candidate.values[-1], len(candidate.values)
        trial.set_user_attr(_REASON, f"{value:.6g} after round {rounds} is poor beside the others")
        self._end(trial, TrialState.PRUNED)
        candidate.close(kept=False)
        return False

    def _refuse(self, trial: optuna.Trial, problem: str) -> None:
        trial.set_user_attr(_REASON, problem)
        trial.set_user_attr(State.REFUSED.value, True)
        self._end(trial, TrialState.PRUNED)  # and not FAIL: proposals keep away from it

    def _end(self, trial: optuna.Trial, state: TrialState, value: float | None = None) -> None:
        frozen = self._study.tell(trial, value, state)
        self._tell(_trial(self._numbers[trial.number], frozen))

    def _is_told(self, trial: optuna.Trial) -> bool:
        return self._study.get_trials(deepcopy=False)[trial.number].state.is_finished()


def _advanced(pair: tuple[optuna.Trial, Candidate]) -> str:
    """Conduct a round; return what is wrong."""
    _, candidate = pair
    try:
        candidate.advance()
    except (Unfit, Refused) as error:
        return str(error)
    value = candidate.values[-1]
    return "" if math.isfinite(value) else f"expected a finite metric, found {value}"


def _report(trial: optuna.Trial, candidate: Candidate) -> None:
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for step, value in enumerate(candidate.values, 1):
        if step not in known:
            trial.report(value, step)


def _trial(number: int, frozen: FrozenTrial) -> Trial:
    states = {TrialState.COMPLETE: State.FINISHED, TrialState.PRUNED: State.STOPPED}
    state = states.get(frozen.state, State.OPEN)
    if state is State.STOPPED and frozen.user_attrs.get(State.REFUSED.value):
        state = State.REFUSED
    took = frozen.duration
    return Trial(
        number,
        state,
        dict(frozen.params),
        tuple(value for _, value in sorted(frozen.intermediate_values.items())),
        0.0 if took is None else took.total_seconds(),
        str(frozen.user_attrs.get(_REASON, "")),
    )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.whole:
        return IntDistribution(int(low), int(high), dimension.log, int(step) or 1)
    return FloatDistribution(low, high, dimension.log, step or None)


def _pruner(name: str) -> optuna.pruners.BasePruner:
    match name:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=_UNSTOPPED_TRIALS)
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case _:
            return optuna.pruners.NopPruner()
