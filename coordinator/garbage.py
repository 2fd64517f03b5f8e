"""What nothing refers to any more: artifacts of forgotten runs, and what killed processes left.

A run that is in the store keeps its plan, the plan's members, and the sums of its rounds: agents
that were away may ask for them after its end. Everything else goes once it is old. That is safe
while others publish: an artifact is renewed before the run or round that refers to it is stored, so
one that is still old after the runs were read belongs to no run that was stored since.
"""

import asyncio
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from coordinator.faults import StorageFault, faults_of
from coordinator.published import Published
from coordinator.store import RunRecord, Store
from fedloom.errors import Refused

GRACE_SECONDS = 24 * 3600.0  # longer than any way from a first artifact to the run it is for
INTERVAL_SECONDS = 24 * 3600.0
_log = structlog.get_logger()


@dataclass(frozen=True)
class Collected:
    """What was deleted."""

    artifacts: int
    artifact_bytes: int
    partials: int  # files and uploads that were begun and never finished
    spools: int  # folders of updates of runs that are over


def collect(
    store: Store,
    published: Published,
    spool: Path,
    now: float,
    grace_seconds: float = GRACE_SECONDS,
) -> Collected:
    """Delete what nothing refers to and is older than the grace; `now` in seconds since 1970.

    Raises StorageFault, and Refused when the plan of a run that is not over cannot be read: what it
    refers to is not known then, and nothing is deleted.
    """
    before = now - GRACE_SECONDS
    old = [artifact for artifact in published.artifacts() if artifact.published_at < before]
    runs = store.runs()
    kept = set(_referred(store, published, runs))
    deleted = [
        artifact.size_bytes
        for artifact in old
        if artifact.sha256 not in kept and published.delete(artifact.sha256, before)
    ]
    open_runs = {run.run_id.hex() for run in runs if not run.phase.over}
    spools = _delete_spools(spool, open_runs, before)
    return Collected(len(deleted), sum(deleted), published.delete_partials(before), spools)


def _referred(store: Store, published: Published, runs: list[RunRecord]) -> Iterator[bytes]:
    """Yield the SHA-256 of every artifact that the runs refer to."""
    for run in runs:
        yield run.plan.sha256
        for record in store.rounds(run.run_id):
            yield record.sum.sha256
            if record.opened is not None:
                yield record.opened.sha256
    # Of the runs of one plan, one that is not over comes last and counts.
    for run in {run.plan: run for run in sorted(runs, key=lambda run: not run.phase.over)}.values():
        yield from _members(published, run)


def _members(published: Published, run: RunRecord) -> Iterator[bytes]:
    try:
        plan = published.read_plan(run.plan)
    except Refused:
        if run.phase.over:
            return  # nobody can tell any more what belonged to it
        raise
    for member in plan.members:
        yield member.sha256


def _delete_spools(spool: Path, open_runs: set[str], before: float) -> int:
    deleted = 0
    with faults_of(str(spool)):
        for folder in spool.iterdir() if spool.is_dir() else ():
            if folder.name not in open_runs and folder.stat().st_ctime < before:
                shutil.rmtree(folder)
                deleted += 1
    return deleted


async def collect_daily(store: Store, published: Published, spool: Path) -> None:
    """Collect now and every day, until cancelled; a fault is logged and tomorrow is another day."""
    while True:
        try:
            collected = await asyncio.to_thread(collect, store, published, spool, time.time())
        except (StorageFault, Refused) as error:
            _log.warning("garbage not collected", problem=str(error))
        else:
            _log.info("garbage collected", **asdict(collected))
        await asyncio.sleep(INTERVAL_SECONDS)
