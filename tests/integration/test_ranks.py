"""Whole runs of devices whose adapters have unequal ranks, and of adapters of r x r values."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coordinator.run_checks import RunFile, Surroundings, check
from coordinator.run_state import Phase
from fedloom.adapters import Theta, read_adapter
from fedloom.plans import ADAPTER_FILE, Role, TrainableTensor
from fedloom.v1 import control_pb2
from tests.integration.federation import Agent, Federation, command, until, write_plan

ROUNDS, R = 3, 8
LAYOUT = (
    TrainableTensor("lora_A", (R, 200), 0, Role.LORA_A),
    TrainableTensor("lora_B", (400, R), 1600, Role.LORA_B),
    TrainableTensor("classifier", (200,), 4800, Role.HEAD),
)
CLIP = 1.0
LEVEL = CLIP / 2**15  # of a grid of 16 bits; weights that differ make coarser ones
RANKS = (2, 4, 8)
RUN = f"""
name = "toy"
plan = "plan"
rounds = {ROUNDS}
[cohort]
minimum = 3
size = 3
[training]
lora = "hetlora"
local_steps = 4
{{training}}
[protection]
kind = "{{kind}}"
clip = {CLIP}
"""


@pytest.fixture(autouse=True)
def adapter_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the toy plan an adapter of rank 8."""
    monkeypatch.setattr("tests.integration.federation.LAYOUT", LAYOUT)


def start(federation: Federation, kind: str, training: str = "") -> bytes:
    """Queue a run as an operator does."""
    file = federation.folder / "run.toml"
    file.write_text(RUN.format(kind=kind, training=training))
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


async def enrolled(federation: Federation) -> list[Agent]:
    """Let devices of these ranks join."""
    agents = await federation.enrol_all()
    for agent, rank in zip(agents, RANKS, strict=True):
        agent.rank = rank
    return agents


async def completed(federation: Federation, run_id: bytes, agents: Sequence[Agent]) -> list[Theta]:
    """Wait for the run's end; return each agent's model."""
    for agent in agents:
        finished = await agent.finished()
        assert finished.outcome == control_pb2.RUN_OUTCOME_COMPLETED, finished.reason
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    return [agent.theta(run_id) for agent in agents]


def upto(theta: Theta, rank: int) -> np.ndarray:
    """Return theta with zeros beyond a rank, in float64."""
    found = theta.astype(np.float64)
    found[rank * 200 : 1600] = 0
    found[1600:4800].reshape(400, R)[:, rank:] = 0
    return found


def product(theta: np.ndarray) -> np.ndarray:
    """Return B A, in float64."""
    b, a = theta[1600:4800].reshape(400, R), theta[:1600].reshape(R, 200)
    return b.astype(np.float64) @ a


def norm(theta: np.ndarray) -> float:
    """Return |B A|."""
    return float(np.linalg.norm(product(theta)))


@pytest.mark.parametrize("kind", ["plain", "masked", "encrypted", "sealed"])
async def test_devices_of_ranks_2_4_and_8_end_with_the_papers_aggregate(
    federation: Federation, tmp_path: Path, kind: str
) -> None:
    agents = await enrolled(federation)
    run_id = start(federation, kind)
    for agent in agents:
        agent.start()
    models = await completed(federation, run_id, agents)
    theta = federation.initial_theta().astype(np.float64)
    for number in range(ROUNDS):
        padded = []
        for agent, rank in zip(agents, RANKS, strict=True):
            trained = agent.engine.history[number]
            # What it trained was the global model of that round, truncated to its own rank.
            np.testing.assert_allclose(trained.theta, upto(theta, rank), atol=(1 + number) * 1e-3)
            padded.append(upto(trained.theta + trained.update.delta, rank))
        weights = np.array([norm(one) for one in padded])
        theta = np.average(padded, axis=0, weights=weights)
    exact = kind == "plain"
    for model in models:
        assert np.array_equal(model, models[0])
        np.testing.assert_allclose(model, theta, rtol=0, atol=1e-4 if exact else 32 * LEVEL)
    if kind in ("plain", "masked"):
        out = tmp_path / "model"
        command("run", "export", "--out", out, "--rank", "2", "--home", federation.home)
        found = read_adapter(out / ADAPTER_FILE, LAYOUT)
        np.testing.assert_array_equal(found, upto(found, 2))
        left, values, right = np.linalg.svd(product(models[0]), full_matrices=False)
        nearest = (left[:, :2] * values[:2]) @ right[:2]
        np.testing.assert_allclose(product(found), nearest, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "sealed"])
async def test_a_device_that_dies_remembers_the_rank_that_it_pruned(
    federation: Federation, kind: str
) -> None:
    """The engine draws; a movement that shrinks the tail is made of its own start."""
    agents = await enrolled(federation)
    victim = agents[2]
    for agent in agents:
        agent.engine.shrinks = True
    run_id = start(federation, kind, "rank_penalty = 0.1\nrank_decay = 0.5")
    folder = victim.home / "runs" / run_id.hex()
    for agent in agents:
        agent.start()
    await until("an update on its way", (folder / "memory.proposed").exists)
    await victim.stop()
    victim.start()
    models = await completed(federation, run_id, agents)
    found: dict[bytes, Theta] = {}
    for trained in victim.engine.history:  # one that was done anew counts once
        found[trained.theta.tobytes()] = trained.theta
    ranks = [
        int(np.flatnonzero(t[:1600].reshape(R, 200).any(axis=1))[-1]) + 1 for t in found.values()
    ]
    assert ranks == [8, 4, 2]
    for model in models:
        assert np.array_equal(model, models[0])
    assert not list(folder.glob("memory*"))


async def test_a_clip_that_the_adapter_exceeds_is_told_before_the_run(
    federation: Federation,
) -> None:
    around = Surroundings(3, 1 << 30, {}, lambda start: None)
    for clip, expected in ((CLIP, 0), (2.0**-5, 1)):
        text = RUN.format(kind="sealed", training="").replace(f"clip = {CLIP}", f"clip = {clip}")
        found = check(RunFile(text, "run.toml", federation.folder), around)
        assert found.problems == []
        assert len(found.warnings) == expected
        assert "less than the plan's largest factor" in "".join(found.warnings) or not expected


# Fed-SB: R of B R A alone

SB_LAYOUT = (
    TrainableTensor("lora_R", (30, 30), 0, Role.LORA_R),
    TrainableTensor("classifier", (4100,), 900, Role.HEAD),
)


@pytest.mark.parametrize("kind", ["plain", "masked", "sealed"])
async def test_fed_sb_averages_r(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Weights of 30, 50 and 100 samples; the exact mean, and an export that the run ends with."""
    monkeypatch.setattr("tests.integration.federation.LAYOUT", SB_LAYOUT)
    shutil.rmtree(federation.folder / "plan")
    federation.plan = write_plan(federation.folder / "plan")
    agents = await federation.enrol_all()
    for agent in agents:
        agent.permitted_release = agent.permitted_release.COORDINATOR
    file = federation.folder / "run.toml"
    text = RUN.format(kind=kind, training="").replace("hetlora", "fed_sb")
    release = 'release = "coordinator"\n' if kind == "sealed" else ""
    file.write_text(text + release)
    run_id = bytes.fromhex(command("run", "start", file, "--home", federation.home))
    for agent in agents:
        agent.start()
    models = await completed(federation, run_id, agents)
    deltas = [[one.update.delta for one in agent.engine.history] for agent in agents]
    weights = [agent.engine.samples for agent in agents]
    expected = federation.initial_theta() + np.average(deltas, axis=0, weights=weights).sum(axis=0)
    for model in models:
        assert np.array_equal(model, models[0])
        bound = 1e-6 if kind == "plain" else 8 * LEVEL
        np.testing.assert_allclose(model, expected, rtol=0, atol=bound)
    command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    found = read_adapter(tmp_path / "model" / ADAPTER_FILE, SB_LAYOUT)
    assert np.array_equal(found, models[0])


@pytest.mark.parametrize(("lora", "nearest"), [("rolora", "fed_sb"), ("hetlora", "fed_sb")])
async def test_rules_of_two_factors_are_refused_for_such_a_plan(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, lora: str, nearest: str
) -> None:
    monkeypatch.setattr("tests.integration.federation.LAYOUT", SB_LAYOUT)
    shutil.rmtree(federation.folder / "plan")
    write_plan(federation.folder / "plan")
    around = Surroundings(3, 1 << 30, {}, lambda start: None)
    text = RUN.format(kind="sealed", training="").replace("hetlora", lora)
    found = check(RunFile(text, "run.toml", federation.folder), around)
    assert f"this plan goes with lora = '{nearest}'" in "; ".join(found.problems)


async def test_fed_sb_is_refused_for_a_plan_of_two_factors(federation: Federation) -> None:
    around = Surroundings(3, 1 << 30, {}, lambda start: None)
    text = RUN.format(kind="sealed", training="").replace("hetlora", "fed_sb")
    found = check(RunFile(text, "run.toml", federation.folder), around)
    assert "built with --lora sb); this plan goes with lora = 'ffa'" in "; ".join(found.problems)
