"""Time to a target accuracy, on a virtual clock: synchronous FedAvg against FedBuff and FedAsync.

    python -m benchmarks.asynchronous [--devices 100] [--target 0.9] [--seeds 5] [--json]

Devices differ in speed: seconds for a round's training are log-normal with a 95th percentile ten
times the 5th, and the same in every run of a seed. Rounds go through `coordinator.rounds` and the
product's strategies (`simulation.virtual_time`), so what differs is who is invited when and what
closes a cohort. The problem: 8 x 8 images of digits (scikit-learn's copy, 1,797 rows), an MLP
64-32-10, labels shared out by Dir(0.5), a fifth of the rows held out for the accuracy.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from coordinator.run_state import RunPolicy
from edge_agent.engine import LocalUpdate
from edge_agent.local_rules import LocalSteps
from fedloom.plans import TrainableTensor
from fedloom.terms import LocalTraining, Optimizer, StalenessWeighting, Strategy, steps_of
from simulation.partitions import dirichlet
from simulation.virtual_time import Device, VirtualRun

HIDDEN, CLASSES, INPUTS = 32, 10, 64
SPREAD = 10.0  # 95th over 5th percentile of training times
MEDIAN_SECONDS, TRANSFER_SECONDS = 60.0, 2.0
SIGMA = math.log(SPREAD) / (2 * 1.6448536269514722)
BUFFER = 10
SHAPES = ((INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))
Vector = NDArray[np.float32]
Rows = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    terms: LocalTraining
    policy: Callable[[int], RunPolicy]  # by the number of devices


def policy(devices: int, **values: int) -> RunPolicy:
    """Return a policy under which no deadline passes."""
    never = 1e9
    stated: dict[str, Any] = {"rounds": 4000, "minimum_agents": 1, "cohort_size": devices} | values
    return RunPolicy(
        needs_key=False,
        gathering_seconds=never,
        training_seconds=never,
        upload_seconds=never,
        applying_seconds=never,
        **stated,
    )


def terms(strategy: Strategy, **values: Any) -> LocalTraining:
    """Return terms that all cases share, but for the strategy's own."""
    shared: dict[str, Any] = {"optimizer": Optimizer.SGD, "learning_rate": 0.1, "batch_size": 8}
    return LocalTraining(strategy=strategy, **(shared | {"local_steps": 10} | values))


def cases() -> list[Case]:
    """Return the rows; the first is what the others are held against."""
    late = {
        "max_staleness": 50,
        "staleness_weighting": StalenessWeighting.POLYNOMIAL,
        "staleness_exponent": 0.5,
    }
    average = terms(Strategy.FED_AVG)
    buffered = terms(Strategy.FED_BUFF, **late)
    mixing = terms(Strategy.FED_ASYNC, mixing=0.2, **late)

    def asynchronous(buffer: int) -> Callable[[int], RunPolicy]:
        return lambda n: policy(n, buffer=buffer, max_staleness=50)

    return [
        Case("FedAvg, all devices", average, policy),
        Case(f"FedAvg, {BUFFER} drawn", average, lambda n: policy(n, cohort_size=BUFFER)),
        Case(
            f"FedAvg, {BUFFER} of {BUFFER * 13 // 10} drawn",
            average,
            lambda n: policy(n, cohort_size=BUFFER * 13 // 10, quorum=BUFFER),
        ),
        Case(f"FedBuff, K = {BUFFER}", buffered, asynchronous(BUFFER)),
        Case(
            f"FedAsync, K = {BUFFER}",
            terms(Strategy.FED_ASYNC, mixing=1.0, **late),
            asynchronous(BUFFER),
        ),
        Case("FedAsync, K = 1", mixing, asynchronous(1)),
    ]


class Digits:
    """The problem: rows of every device, and those held out."""

    def __init__(self, devices: int, seed: int) -> None:
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        inputs, labels = images[order] / 16.0, labels[order].astype(np.int64)
        held_out = len(labels) // 5
        self.held_out: Rows = inputs[:held_out], labels[:held_out]
        inputs, labels = inputs[held_out:], labels[held_out:]
        parts = dirichlet(labels, devices, 0.5, seed)
        self.rows: list[Rows] = [(inputs[part], labels[part]) for part in parts]

    def accuracy(self, theta: Vector) -> float:
        """Return the share of held-out images that are recognised."""
        inputs, labels = self.held_out
        return float((_forward(_parts(theta), inputs)[1].argmax(1) == labels).mean())


def _parts(theta: Vector) -> list[NDArray[np.float64]]:
    sizes = [math.prod(shape) for shape in SHAPES]
    pieces = np.split(theta.astype(np.float64), np.cumsum(sizes)[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def _forward(
    parts: list[NDArray[np.float64]], inputs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    hidden = np.tanh(inputs @ parts[0] + parts[1])
    return hidden, hidden @ parts[2] + parts[3]


def gradient(theta: Vector, inputs: NDArray[np.float64], labels: NDArray[np.int64]) -> Vector:
    """Return the gradient of the mean cross-entropy."""
    parts = _parts(theta)
    hidden, logits = _forward(parts, inputs)
    errors = np.exp(logits - logits.max(1, keepdims=True))
    errors /= errors.sum(1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1
    errors /= len(labels)
    back = (errors @ parts[2].T) * (1 - hidden**2)
    found = (inputs.T @ back, back.sum(0), hidden.T @ errors, errors.sum(0))
    return np.concatenate([piece.ravel() for piece in found]).astype(np.float32)


def device(rows: Rows, seed: int, index: int, seconds: float) -> Device:
    """Return a device that trains on its rows, in an order that the seed draws."""
    inputs, labels = rows

    def train(theta: Vector, terms: LocalTraining, number: int) -> LocalUpdate:
        chooser = np.random.default_rng((seed, index, number))
        steps = steps_of(terms, len(labels))
        local, moved = LocalSteps(theta, terms, steps), theta.copy()
        for _ in range(steps):
            chosen = chooser.integers(0, len(labels), terms.batch_size)
            local.step(moved, gradient(moved, inputs[chosen], labels[chosen]))
        return LocalUpdate(moved - theta, len(labels), 0.0)

    return Device(train, seconds, TRANSFER_SECONDS)


def run(case: Case, count: int, seed: int) -> Iterator[tuple[float, int, float, float]]:
    """Yield (seconds, rounds, accuracy, mean staleness) after each round."""
    problem, random = Digits(count, seed), np.random.default_rng(seed)
    seconds = MEDIAN_SECONDS * np.exp(SIGMA * random.standard_normal(count))
    devices = {
        f"device-{index:03}": device(rows, seed, index, float(seconds[index]))
        for index, rows in enumerate(problem.rows)
    }
    start = np.concatenate(
        [random.normal(0, 1 / math.sqrt(shape[0]), math.prod(shape)) for shape in SHAPES]
    ).astype(np.float32)
    layout = (TrainableTensor("mlp", (len(start),), 0),)
    simulated = VirtualRun(case.policy(count), case.terms, layout, devices, start)
    for moment in simulated.moments():
        stale = sum(moment.staleness) / len(moment.staleness)
        yield moment.seconds, moment.rounds, problem.accuracy(moment.theta), stale


def to_target(case: Case, count: int, seed: int, target: float) -> dict[str, float]:
    """Return when the target is reached first, in how many rounds, by updates of what age."""
    ages = []
    for seconds, rounds, accuracy, stale in run(case, count, seed):
        ages.append(stale)
        if accuracy >= target:
            return {"seconds": seconds, "rounds": rounds, "staleness": sum(ages) / len(ages)}
    return {"seconds": math.inf, "rounds": math.inf, "staleness": sum(ages) / len(ages)}


def _ratio(slower: list[dict[str, float]], faster: list[dict[str, float]]) -> float:
    """Return how many times as long the first takes, the median over the seeds."""
    return median(a["seconds"] / b["seconds"] for a, b in zip(slower, faster, strict=True))


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {
        case.name: [
            to_target(case, options.devices, seed, options.target) for seed in range(options.seeds)
        ]
        for case in cases()
    }
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"| | hours to {options.target:.0%}, median (least .. most) | rounds | staleness | "
        "all devices / this | drawn / this |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    names = list(found)
    for name, rows in found.items():
        hours = [row["seconds"] / 3600 for row in rows]
        ratios = [f"{_ratio(found[one], rows):.2f}" for one in names[:2]]
        middle = f"{median(hours):.2f} ({min(hours):.2f} .. {max(hours):.2f})"
        rounds, ages = (median(row[key] for row in rows) for key in ("rounds", "staleness"))
        print(f"| {name} | {middle} | {rounds:.0f} | {ages:.1f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
