"""Whole runs with a sum for each of several random groups: who is hostile decides its own alone."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator.premises import open_published
from edge_agent.engine import LocalUpdate
from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE
from tests.integration.engines import LARGEST_VALUE
from tests.integration.federation import LAYOUT, Agent, Federation, command, until
from tests.integration.test_restarts import all_agree
from tests.integration.test_strategies import distinct

CLIP, GROUPS, ROUNDS = 1.0, 3, 2
SAMPLES = (30, 50, 100, 20, 40, 60, 70, 80, 90)
RUN = """
name = "toy"
plan = "plan"
rounds = {rounds}
[cohort]
minimum = 9
size = 9
[training]
learning_rate = 0.01
[protection]
kind = "{kind}"
clip = {clip}
release = "{release}"
[aggregation]
rule = "{rule}"
groups = {groups}
"""


def spoilt(update: LocalUpdate) -> LocalUpdate:
    """Send a huge step in the wrong direction: what the encoding lets through of it."""
    return replace(update, delta=np.float32(-1e6) * update.delta)


def start(
    federation: Federation, kind: str, rule: str = "median", release: str = "agents"
) -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    values = {"rounds": ROUNDS, "clip": CLIP, "groups": GROUPS}
    file.write_text(RUN.format(kind=kind, rule=rule, release=release, **values))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


def drawn_groups(federation: Federation, run_id: bytes, number: int) -> list[list[int]]:
    """Return the slots of a round's groups, as its sum states them."""
    record = federation.store.rounds(run_id)[number]
    header = b"".join(open_published(federation.home).parts(record.sum.sha256, 0))
    stated = np.frombuffer(header[: 2 * len(record.slots)], "<u2")
    assert record.slots == tuple(range(9))
    return [np.flatnonzero(stated == group).tolist() for group in range(GROUPS)]


def expected(federation: Federation, run_id: bytes, agents: list[Agent], clip: float) -> Theta:
    """Repeat the run in float64: the median of the groups' weighted means, round by round."""
    theta = federation.initial_theta().astype(np.float64)
    by_slot = sorted(agents, key=lambda agent: agent.name)
    samples = np.array([agent.engine.samples for agent in by_slot], np.float64)
    for number in range(ROUNDS):
        moved = np.stack([distinct(agent)[number][0].clip(-clip, clip) for agent in by_slot])
        groups = drawn_groups(federation, run_id, number)
        assert sorted(map(len, groups)) == [3, 3, 3]
        means = [samples[own] @ moved[own] / samples[own].sum() for own in groups]
        theta += np.median(means, axis=0)
    return theta


@pytest.mark.parametrize("kind", ["plain", "masked", "encrypted", "sealed"])
async def test_a_hostile_agent_decides_its_own_group_alone(
    federation: Federation, kind: str
) -> None:
    """The coordinator stops in round 2, too, and goes on with what is spooled."""
    agents = await federation.enrol_all(SAMPLES)
    agents[4].engine._spoil = spoilt
    agents[7].engine.pauses_at = 2
    run_id = start(federation, kind)
    for agent in agents:
        agent.start()
    await until("round 2", lambda: agents[7].engine.begun == 2)
    await federation.stop()
    agents[7].engine.may_finish.set()
    await federation.start()
    theta = await all_agree(federation, run_id, agents)
    # The others' values, whatever it sends; a mean of all would have moved some by CLIP / 9.
    moved = np.abs(theta - federation.initial_theta()).max()
    assert moved <= ROUNDS * LARGEST_VALUE + 1e-5
    clip = np.inf if kind == "plain" else CLIP
    np.testing.assert_allclose(theta, expected(federation, run_id, agents, clip), rtol=0, atol=1e-5)
    told = command("run", "privacy", "--home", federation.home)
    assert "in 3 random groups, at least 3 of them in each group" in " ".join(told.split())


@pytest.mark.parametrize("kind", ["masked", "sealed"])
async def test_the_coordinator_exports_what_agents_make_of_the_groups(
    federation: Federation, kind: str
) -> None:
    """Under `masked` it opens the groups' sums, under `sealed` agents return the rule's result."""
    agents = await federation.enrol_all(SAMPLES)
    for agent in agents:
        agent.permitted_release = type(agent.permitted_release).COORDINATOR
    run_id = start(federation, kind, "geometric_median", "coordinator")
    for agent in agents:
        agent.start()
    theta = await all_agree(federation, run_id, agents)
    folder = federation.folder / "exported"
    command("run", "export", "--out", folder, "--home", federation.home)
    np.testing.assert_array_equal(read_adapter(folder / ADAPTER_FILE, LAYOUT), theta)


def test_groups_are_checked_before_the_run_starts(federation: Federation) -> None:
    with pytest.raises(
        BaseException, match=r"expected .* with aggregation\.groups, found \"krum\""
    ):
        start(federation, "sealed", "krum")
    assert federation.store.runs() == []
