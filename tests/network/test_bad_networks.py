"""Runs over networks that delay, choke, stall, cut and vanish: they finish, with the right sum."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.run_state import Phase
from coordinator.services.limits import Admission
from fedloom.artifacts import read_parts
from fedloom.channels import CLIENT_OPTIONS
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation, until, weighted_mean
from tests.integration.processes import coordinator
from tests.integration.test_rounds import quantisation_bound
from tests.network.conftest import hasty, parts_of
from tests.network.proxy import Link, Proxy, proxy

SAMPLES = (30, 50, 100)
# TLS with a client's certificate, HTTP/2's own frames, hello and the run's messages.
CONNECTION_BYTES = 12_288
FRAMING = 1.05  # of what is sent: records of TLS, frames of HTTP/2


@asynccontextmanager
async def behind(*links: Link, federation: Federation) -> AsyncIterator[list[Proxy]]:
    """Enrol three agents and put the first ones behind these links."""
    agents = await federation.enrol_all(SAMPLES)
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(proxy(federation.control_port, link)) for link in links
        ]
        for agent, found in zip(agents, proxies, strict=False):
            agent.identity = replace(agent.identity, control_address=found.address)
        yield proxies
        await asyncio.gather(*(agent.stop() for agent in agents))


async def start(federation: Federation, kind: str, rounds: int = 1, **terms: float) -> bytes:
    """Connect everybody, then start a run."""
    for agent in federation.agents:
        agent.start()
    await federation.connected(federation.agents)
    return federation.start_run(kind, rounds, **terms)  # type: ignore[arg-type]


async def ends_well(federation: Federation, run_id: bytes, kind: str) -> None:
    """Everybody has the same model, and it is the weighted mean of what was trained."""
    agents = federation.agents
    for agent in agents:
        assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    theta = agents[0].theta(run_id)
    for agent in agents[1:]:
        assert np.array_equal(agent.theta(run_id), theta)
    [record] = federation.store.rounds(run_id)
    initial = federation.initial_theta()
    mean = initial + weighted_mean([agents[slot] for slot in record.slots], initial)
    levels = 0.0
    if kind != "plain":
        levels = quantisation_bound(SAMPLES, cap=128) + 2 * np.spacing(np.float32(1))
    assert np.abs(theta - mean).max() <= levels


def sent_bytes(federation: Federation, run_id: bytes, agent: Agent) -> int:
    """Return the payload of this agent that the coordinator has stored, in all rounds."""
    reports = federation.store.reports(run_id)
    return sum(r["sent_bytes"] for r in reports if r["agent_id"] == agent.name)


def spooled_bytes(federation: Federation, run_id: bytes) -> int:
    """Return how much of the first agent's unfinished upload the coordinator has."""
    folder = federation.home / "spool" / run_id.hex()
    return sum(part.stat().st_size for part in folder.rglob("0.*.part"))


def update_bytes(federation: Federation, agent: Agent, run_id: bytes) -> int:
    """Return the size of the agent's last update."""
    return (agent.home / "runs" / run_id.hex() / "update.bin").stat().st_size


async def test_everybody_is_far_away(federation: Federation) -> None:
    links = [Link(latency=0.3) for _ in SAMPLES]
    async with behind(*links, federation=federation):
        await ends_well(federation, await start(federation, "sealed"), "sealed")


async def test_an_agent_behind_64_kbit_a_second(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts_of(monkeypatch, 2048)  # ten of 20 KB
    async with behind(Link(bytes_per_second=8000, latency=0.05), federation=federation) as proxies:
        run_id = await start(federation, "plain")
        await ends_well(federation, run_id, "plain")
        assert len(proxies[0].connections) == 1, "a slow link is no dead one"


async def test_a_slow_link_is_not_taken_for_a_dead_one(
    monkeypatch: pytest.MonkeyPatch, large_updates: int, federation: Federation
) -> None:
    # 48 kbit/s for 100 s, all of it ten times faster: the link, the agent's patience, and the clock
    # that sizes its parts. What does not scale is the window that fills the link.
    haste = 10
    monkeypatch.setattr("edge_agent.connection.CLIENT_OPTIONS", hasty(CLIENT_OPTIONS, haste))
    hasty_clock = functools.partial(read_parts, clock=lambda: haste * time.monotonic())
    monkeypatch.setattr("edge_agent.transfer.read_parts", hasty_clock)
    link = Link()
    async with behind(link, federation=federation) as (found,):
        slow = federation.agents[0]
        slow.engine.may_finish.clear()
        run_id = await start(federation, "plain")
        await until("the plan to be there", slow.engine.training.is_set)
        link.bytes_per_second = haste * 6000
        slow.engine.may_finish.set()
        await until("its update", lambda: federation.store.rounds(run_id))
        link.bytes_per_second = float("inf")
        await ends_well(federation, run_id, "plain")
        assert update_bytes(federation, slow, run_id) > large_updates
        assert len(found.connections) == 1


async def test_a_link_that_stalls_and_breaks_again_and_again(
    many_parts: int, federation: Federation, tmp_path: Path
) -> None:
    cuts = 4
    breaks = iter([40_000] * cuts)
    link = Link(
        latency=0.01,
        bytes_per_second=250_000,  # what arrived, but was not read when the cut came, is lost
        stall_share=0.02,
        reset_after=lambda: next(breaks, None),
        seed=7,
    )
    async with behind(link, federation=federation) as (found,):
        await federation.stop()  # it gets a process: here, its reading would wait for encryptions
        run_id = federation.start_run("plain", rounds=1)
        async with coordinator(federation, tmp_path / "coordinator.log"):
            for agent in federation.agents:
                agent.start()
            await ends_well(federation, run_id, "plain")
        assert len(found.connections) == cuts + 1
        size = update_bytes(federation, federation.agents[0], run_id)
        assert size > cuts * 40_000 - 3 * CONNECTION_BYTES, "every cut falls into the upload"
        allowed = FRAMING * size + cuts * many_parts + (cuts + 1) * CONNECTION_BYTES
        assert found.up_bytes <= allowed
        assert sent_bytes(federation, run_id, federation.agents[0]) == size


@pytest.mark.parametrize(
    ("up", "down"), [(True, True), (True, False), (False, True)], ids=["both", "up", "down"]
)
@pytest.mark.usefixtures("hasty_agents", "hasty_coordinator")
async def test_both_sides_notice_a_half_open_connection(
    federation: Federation, up: bool, down: bool
) -> None:
    async with behind(Link(latency=0.01), federation=federation) as (found,):
        agent = federation.agents[0]
        agent.engine.may_finish.clear()
        run_id = await start(federation, "plain")
        await until("the agent to train", agent.engine.training.is_set)
        found.abandon(up=up, down=down)
        dead = found.connections[0]
        # One side's end may tell the other; either way both are gone before anything is sent.
        await until("the agent to notice", lambda: dead.agent_gone)
        await until("the coordinator to notice", lambda: dead.coordinator_gone)
        agent.engine.may_finish.set()
        await ends_well(federation, run_id, "plain")
        assert len(found.connections) == 2


async def test_an_agent_that_moves_while_it_uploads_is_not_held_up_by_its_older_streams(
    many_parts: int, federation: Federation
) -> None:
    kind = "sealed"
    link = Link(bytes_per_second=100_000)
    async with behind(link, federation=federation) as (found,):
        agent = federation.agents[0]
        run_id = await start(federation, kind)
        await until("the upload", lambda: spooled_bytes(federation, run_id))
        older = found.connections[0]
        found.rebind()
        # The coordinator hears nothing of it for its 50 s: the newer streams take over at once.
        await ends_well(federation, run_id, kind)
        assert not older.coordinator_gone
        assert len(found.connections) == 2
        size = update_bytes(federation, agent, run_id)
        assert found.up_bytes <= FRAMING * size + many_parts + 2 * CONNECTION_BYTES
        assert sent_bytes(federation, run_id, agent) == size


async def test_a_coordinator_that_is_away_for_a_while_and_listens_again(
    many_parts: int, federation: Federation
) -> None:
    async with behind(Link(bytes_per_second=400_000), federation=federation) as (found,):
        federation.agents[0].engine.may_finish.clear()
        run_id = await start(federation, "sealed")
        await until("training", federation.agents[0].engine.training.is_set)
        await federation.stop()
        federation.agents[0].engine.may_finish.set()
        await asyncio.sleep(1.0)  # refused connections, one after another
        await federation.start()
        await ends_well(federation, run_id, "sealed")
        assert found.connections[0].agent_gone


@pytest.mark.slow
async def test_an_outage_of_thirty_seconds(many_parts: int, federation: Federation) -> None:
    async with behind(Link(bytes_per_second=100_000), federation=federation) as (found,):
        run_id = await start(federation, "plain")
        await until("the upload", lambda: spooled_bytes(federation, run_id))
        found.link.freeze()
        await asyncio.sleep(30)
        found.link.thaw()
        await ends_well(federation, run_id, "plain")
        size = update_bytes(federation, federation.agents[0], run_id)
        cuts = len(found.connections) - 1
        allowed = FRAMING * size + cuts * many_parts + (cuts + 1) * CONNECTION_BYTES
        assert found.up_bytes <= allowed


async def test_an_agent_too_slow_for_the_deadline_leaves_the_round_and_is_in_the_next(
    admission: list[Admission], many_parts: int, federation: Federation
) -> None:
    link = Link()
    async with behind(link, federation=federation):
        slow, *others = federation.agents
        slow.engine.may_finish.clear()
        run_id = await start(federation, "plain", rounds=2, minimum=2, upload=1.5)
        await until("the slow agent to train", slow.engine.training.is_set)
        link.bytes_per_second = 8000  # 200 KB would take it 25 s
        slow.engine.may_finish.set()
        await until("round 1", lambda: federation.store.rounds(run_id))
        await until("it to stop sending for that round", lambda: not admission[0].transfers)
        link.bytes_per_second = float("inf")
        for agent in federation.agents:
            assert (await agent.finished()).outcome == control_pb2.RUN_OUTCOME_COMPLETED
        slots = [record.slots for record in federation.store.rounds(run_id)]
        assert slots == [(1, 2), (0, 1, 2)]
        size = update_bytes(federation, slow, run_id)
        assert sent_bytes(federation, run_id, slow) < 1.5 * size, "most of the late one stayed"
        assert all(np.array_equal(a.theta(run_id), slow.theta(run_id)) for a in others)


async def test_training_holds_one_call_open(
    admission: list[Admission], federation: Federation
) -> None:
    async with behind(federation=federation):
        agents = federation.agents
        for agent in agents:
            agent.engine.may_finish.clear()
        run_id = await start(federation, "plain")
        for agent in agents:
            await until("training", agent.engine.training.is_set)
        assert not admission[0].transfers
        assert admission[0].streams == {agent.name: 1 for agent in agents}
        for agent in agents:
            agent.engine.may_finish.set()
        await ends_well(federation, run_id, "plain")
