"""A worker process with a part of the sum is killed: the sum is built again from the spool."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from coordinator.published import PublishedFolder
from coordinator.round_sum import RoundSum
from coordinator.run_state import Phase
from crypto import ciphertexts
from fedloom.artifacts import ArtifactReference
from tests.integration.federation import Federation, weighted_mean
from tests.integration.test_rounds import SAMPLES, quantisation_bound

WORKERS = 2


def kill_a_worker() -> None:
    """Kill one of the sum's processes, as the kernel does when memory is short."""
    children = multiprocessing.active_children()
    assert len(children) == WORKERS
    pid = children[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    children[0].join()


@pytest.fixture
def sum_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add in processes, however small the updates are; agents open in their own."""
    made, original = count(), ciphertexts.CiphertextTotal.__init__

    def init(self: ciphertexts.CiphertextTotal, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        if next(made) == 0:  # what is built again asks for one process, and gets one
            self._processes = WORKERS

    monkeypatch.setattr(ciphertexts.CiphertextTotal, "__init__", init)


@pytest.mark.parametrize("kind", ["encrypted", "sealed"])
async def test_a_worker_that_is_killed_between_two_updates(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, sum_in_workers: None, kind: str
) -> None:
    add, added = RoundSum._add, count(1)

    def killing(self: RoundSum, slot: int, path: Path) -> None:
        if next(added) == 3:
            kill_a_worker()
        add(self, slot, path)

    monkeypatch.setattr(RoundSum, "_add", killing)
    await check_round(federation, federation.start_run(kind, rounds=1))
    assert next(added) == len(SAMPLES) + 1  # nobody was asked again


@pytest.mark.parametrize("kind", ["encrypted", "sealed"])
async def test_a_worker_that_is_killed_while_the_sum_is_published(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, sum_in_workers: None, kind: str
) -> None:
    put, published = PublishedFolder.put, count(1)

    def killing(self: PublishedFolder, parts: Iterator[bytes]) -> ArtifactReference:
        if next(published) == 1:
            kill_a_worker()
        return put(self, parts)

    run_id = federation.start_run(kind, rounds=1)  # its plan is published too
    monkeypatch.setattr(PublishedFolder, "put", killing)
    await check_round(federation, run_id)
    assert next(published) == 3  # the sum was published twice, the first time in vain


async def check_round(federation: Federation, run_id: bytes) -> None:
    """Take part with all agents; the adapter is what their updates' mean makes of it."""
    agents = await federation.enrol_all(SAMPLES)
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    (record,) = federation.store.rounds(run_id)
    assert (record.attempt, record.slots) == (1, (0, 1, 2))
    theta = federation.initial_theta()
    bound = quantisation_bound(SAMPLES, record.weight_cap) + 1e-7
    for agent in agents:
        error = np.abs(agent.theta(run_id) - theta - weighted_mean(agents, theta)).max()
        assert error <= bound
