"""Run one case: deal its rows, build its plan, train in every way, keep what each reached."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from coordinator.plans import PlanRequest, build_plan
from examples.headline.cases import Case
from examples.headline.results import Result, read_result, settings_of, write_result
from examples.headline.rows import count, held_back, joined, shortened, write_rows
from examples.headline.scores import Judge
from examples.headline.training import Trainer, train_alone, train_together
from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan, load_plan
from fedloom.terms import LocalTraining

FEDERATED = "federated"
CENTRALISED = "centralised"
LOCAL = "local-only"
QUICK_ROWS = 60  # of each agent
QUICK_ROUNDS = 2
Report = Callable[[str], None]
Build = Callable[[PlanRequest, Path, Report, Path | None], Plan]


@dataclass(frozen=True)
class Compared:
    """A case with its results by the name of the training."""

    case: Case
    agents: int
    rows: int
    results: Mapping[str, Result]


@dataclass(frozen=True)
class Bench:
    """Everything that a case's trainings need, on the disk."""

    trainer: Trainer
    agents: Sequence[Path]
    together: Path  # all agents' rows
    judge: Judge


def quickened(case: Case) -> Case:
    """Return a case that shows in a minute that everything works, and whose figures say nothing."""

    def hurried(terms: LocalTraining) -> LocalTraining:
        return replace(terms, local_steps=4, epochs=1)

    return replace(
        case,
        name=f"{case.name}-quick",
        most_rows=QUICK_ROWS,
        test_rows=QUICK_ROWS,
        rounds=QUICK_ROUNDS,
        score_every=1,
        terms=hurried(case.terms),
        apart=hurried(case.apart),
        others={name: hurried(terms) for name, terms in case.others.items()},
    )


def compare(
    case: Case, data: Path, models: Path, out: Path, report: Report, build: Build = build_plan
) -> Compared:
    """Return what each training reaches; those of which `out` has the results are not repeated."""
    folder = out / case.name
    dealt = case.deal((data / case.data).parent)
    request = case.request(models, dealt)
    if case.choosing:
        dealt = held_back(dealt, case.most_rows)
    else:
        dealt = shortened(dealt, case.most_rows, case.test_rows)
    plan = out / "plans" / settings_of(request)
    if not (plan / PLAN_FILE).is_file():
        build(request, plan, report, out / "graphs")
    agents = [
        write_rows(folder / f"agent-{number}", rows) for number, rows in enumerate(dealt.agents, 1)
    ]
    trainer = _trainer(plan)
    bench = Bench(
        trainer,
        agents,
        write_rows(folder / "together", joined(dealt.agents)),
        Judge(trainer, case.measure, write_rows(folder / "test", dealt.test)),
    )
    results = _results(case, bench, folder, report)
    return Compared(case, len(agents), sum(map(count, dealt.agents)), results)


def _trainer(folder: Path) -> Trainer:
    plan = load_plan(folder)
    return Trainer(folder, plan, read_adapter(folder / ADAPTER_FILE, plan.layout))


def _results(case: Case, bench: Bench, folder: Path, report: Report) -> dict[str, Result]:
    results = {}
    files = (*bench.agents, bench.judge.test)
    data = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    for name, (facts, train) in _trainings(case, bench, report).items():
        path = folder / f"{name}.json"
        settings = settings_of(bench.trainer.folder.name, case.measure, data, *facts)
        result = read_result(path, settings)
        if result is None:
            result = _timed(settings, train)
            write_result(path, result)
        scores = " ".join(f"{score:.1f}" for score in result.scores)
        report(f"{case.name}, {name}: {scores} ({result.cpu_seconds:.0f} s of CPU)")
        results[name] = result
    return results


Training = tuple[tuple[object, ...], Callable[[], Sequence[float]]]


def _trainings(case: Case, bench: Bench, report: Report) -> dict[str, Training]:
    """Return the trainings by name: what decides the outcome, and what gives it."""
    measured = bench.judge.score()

    def score(theta: Theta) -> float:
        found = measured(theta)
        report(f"{case.name}: {case.measure} {found:.2f}")
        return found

    def federated(terms: LocalTraining) -> Training:
        def train() -> list[float]:
            rounds = train_together(bench.trainer, bench.agents, terms, case.rounds, case.seed)
            return [
                mean(map(score, models))
                for number, models in enumerate(rounds, 1)
                if number % case.score_every == 0
            ]

        return (terms, case.rounds, case.score_every, case.seed), train

    def centralised() -> list[float]:
        return [score(train_alone(bench.trainer, bench.together, case.apart, case.seed))]

    def local() -> list[float]:
        first = case.seed * len(bench.agents)
        return [
            mean(
                score(train_alone(bench.trainer, rows, alone, seed))
                for seed, rows in enumerate(bench.agents, first)
            )
        ]

    alone = case.alone or case.apart
    return {
        FEDERATED: federated(case.terms),
        **{name: federated(terms) for name, terms in case.others.items()},
        CENTRALISED: ((case.apart, case.seed), centralised),
        **({LOCAL: ((alone, case.seed), local)} if case.alone_too else {}),
    }


def _timed(settings: str, train: Callable[[], Sequence[float]]) -> Result:
    started, cpu = time.monotonic(), time.process_time()
    scores = tuple(train())
    return Result(settings, scores, time.process_time() - cpu, time.monotonic() - started)
