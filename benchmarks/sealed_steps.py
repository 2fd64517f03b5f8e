"""The four steps of a sealed sum over files, as agent and coordinator run them, and their cost.

`costs`: wall time, CPU time of all processes, memory of the workers. `gaps`: an event loop ticks
every millisecond while a step runs in a thread; the time between two ticks is what the step, with
which the loop shares the interpreter's lock, and the rest of the machine leave it. The CPU time
that this process used between two ticks says how much of that was the step.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import crypto
from crypto import sealed, workers
from fedloom.artifacts import write_artifact

MEMBERS, PAIRS, CLIP = 8, 16, 0.05
STEPS = ("encode", "add", "publish", "open")
IDLE_SECONDS, TICK_SECONDS = 2.0, 0.001


def update(count: int, member: int) -> np.ndarray:
    values = np.random.default_rng(member).standard_normal(count, dtype=np.float32)
    return np.clip(values * np.float32(0.01), -CLIP, CLIP)


class Sum:
    """One attempt; what a step needs of the step before it lies in a folder."""

    def __init__(self, count: int, processes: int, folder: Path) -> None:
        self._processes, self._folder = processes, folder
        self._context = crypto.UpdateContext(bytes(16), 1, 1, count, 100, 1, CLIP, cohort=bytes(32))
        self._key = crypto.RunKey(bytes(32))
        self._own = [crypto.Mask(bytes([i]) * 32) for i in range(100)]
        self._pairs = [crypto.Mask(os.urandom(32)) for _ in range(PAIRS)]
        self._update = update(count, 0)
        self._total = sealed.accumulator(self._context, processes)

    def encode(self, member: int) -> None:
        # Even members add the masks of their pairs, odd ones subtract them.
        pairs = [crypto.Mask(mask.key, 1 - 2 * (member % 2)) for mask in self._pairs]
        rng, masks = np.random.default_rng(member), [self._own[member], *pairs]
        encoder = sealed.encoder(self._context, member, self._key, rng, masks, self._processes)
        write_artifact(self._folder / str(member), encoder.encode(self._update, 1))

    def add(self, member: int) -> None:
        with (self._folder / str(member)).open("rb", buffering=0) as file:
            self._total.add(member, file)

    def publish(self, _: int) -> None:
        left = crypto.Correction(tuple(self._own[: len(self._total.members)]))
        write_artifact(self._folder / "sum", self._total.result(left))

    def open(self, _: int) -> None:
        with (self._folder / "sum").open("rb", buffering=0) as file:
            members = self._total.members
            sealed.open_sum(self._context, self._key, members, file, self._processes)

    def rounds(self, repeats: int) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield every step as often as asked for, in an order in which each has what it needs."""
        members = 2 * ((repeats + 1) // 2)  # so that the pairs cancel
        for name in STEPS:
            step = getattr(self, name)
            for i in range(members if name in ("encode", "add") else repeats):
                yield name, lambda i=i, step=step: step(i)


# costs


@dataclass(frozen=True)
class Usage:
    """What a process has used so far."""

    cpu_seconds: float
    peak_kib: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        nanoseconds = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
        status = Path(f"/proc/{pid}/status").read_text()
        return cls(nanoseconds / 1e9, int(status.split("VmHWM:")[1].split()[0]))


class WatchedWorkers(workers.Workers[Any, Any]):
    """Workers that leave what they used."""

    ended: ClassVar[list[Usage]] = []

    def close(self) -> None:
        self.ended.extend(Usage.of(process.pid or 0) for process in self._processes)
        super().close()


def all_usage() -> list[Usage]:
    """Return what this process and all its workers, living and ended, have used."""
    living = [Usage.of(child.pid or 0) for child in active_children()]
    own = Usage(time.process_time(), 0)
    return [own, *living, *WatchedWorkers.ended]


def costs(count: int, processes: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each step: the least of the repeats of each figure."""
    workers.Workers = WatchedWorkers  # type: ignore[misc]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as folder:
        for name, step in Sum(count, processes, Path(folder)).rounds(repeats):
            before, started = all_usage(), time.perf_counter()
            step()
            wall, after = time.perf_counter() - started, all_usage()
            cpu = sum(u.cpu_seconds for u in after) - sum(u.cpu_seconds for u in before)
            peak = max(u.peak_kib for u in after) / 1024
            row = rows.setdefault(name, {"step": name, "parameters": count, "processes": processes})
            row["wall_ms"] = min(row.get("wall_ms", wall * 1e3), wall * 1e3)
            row["cpu_ms"] = min(row.get("cpu_ms", cpu * 1e3), cpu * 1e3)
            row["worker_peak_mib"] = max(row.get("worker_peak_mib", 0.0), peak)
    return list(rows.values())


# gaps


def gaps(count: int, processes: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for an idle loop and for each step: milliseconds between two ticks."""
    found: dict[str, list[np.ndarray]] = {"idle": []}
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as folder:
        for _ in range(repeats):
            found["idle"].append(asyncio.run(_beside(lambda: time.sleep(IDLE_SECONDS))))
        for name, step in Sum(count, processes, Path(folder)).rounds(repeats):
            found.setdefault(name, []).append(asyncio.run(_beside(step)))
    return [
        {
            "step": name,
            "parameters": count,
            "processes": processes,
            "p50_ms": float(np.median(np.concatenate(ticks)[:, 0])),
            "p99_ms": float(np.percentile(np.concatenate(ticks)[:, 0], 99)),
            "max_ms": float(np.median([one[:, 0].max() for one in ticks])),
            "worst_max_ms": max(float(one[:, 0].max()) for one in ticks),
            "cpu_ms": max(float(one[:, 1].max()) for one in ticks),
        }
        for name, ticks in found.items()
    ]


async def _beside(step: Callable[[], None]) -> np.ndarray:
    return await waits(asyncio.ensure_future(asyncio.to_thread(step)))


async def waits(doing: "asyncio.Future[Any]") -> np.ndarray:
    """Return the milliseconds between ticks until it is done: (ticks, 2), wall and CPU."""
    ticks = [(time.perf_counter(), time.process_time())]
    while not doing.done():
        await asyncio.sleep(TICK_SECONDS)
        ticks.append((time.perf_counter(), time.process_time()))
    await doing
    return np.diff(ticks, axis=0) * 1e3
