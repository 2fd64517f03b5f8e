"""Whole runs: every agent ends with the same bits, and they are the mean's."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import crypto
from coordinator.run_state import Phase
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.plans import ADAPTER_FILE
from fedloom.terms import Encoding, LocalTraining, Protection, clip_of
from fedloom.v1 import control_pb2
from tests.integration.engines import two_classes
from tests.integration.federation import (
    LAYOUT,
    PARAMETERS,
    Agent,
    Federation,
    command,
    weighted_mean,
)
from tests.integration.test_agent_commands import agent_command

SAMPLES = (30, 50, 100)


async def complete(federation: Federation, run_id: bytes, agents: list[Agent]) -> None:
    """Take part with these agents until the run is over."""
    for agent in agents:
        agent.start()
    for agent in agents:
        finished = await agent.finished()
        assert finished.outcome == control_pb2.RUN_OUTCOME_COMPLETED, finished.reason
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED


def quantisation_bound(weights: tuple[int, ...], cap: int) -> float:
    """Bound the error of one round's mean: each update is off by less than one level."""
    terms, encoding = LocalTraining(learning_rate=1e-2), Encoding(Protection.ENCRYPTED, 10)
    clip = clip_of(encoding, terms, cap)
    context = crypto.UpdateContext(bytes(16), 1, 1, PARAMETERS, 10, cap, clip)
    levels = crypto.BfvParameters.derive(context).half_levels
    return len(weights) * clip * cap / (levels * sum(weights))


@pytest.mark.parametrize("count", [1, 3])
async def test_a_plain_run_is_the_weighted_mean_to_the_bit(
    federation: Federation, count: int, tmp_path: Path
) -> None:
    agents = await federation.enrol_all(SAMPLES[:count])
    run_id = federation.start_run("plain", rounds=3, minimum=count)
    await complete(federation, run_id, agents)

    theta = federation.initial_theta()
    for _ in range(3):
        theta = theta + weighted_mean(agents, theta)
    for agent in agents:
        assert np.array_equal(agent.theta(run_id), theta)

    command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    assert np.array_equal(read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT), theta)


@pytest.mark.parametrize("kind", ["masked", "encrypted", "sealed"])
async def test_a_protected_run_is_the_weighted_mean_within_its_levels(
    federation: Federation, tmp_path: Path, kind: str
) -> None:
    agents = await federation.enrol_all(SAMPLES)
    run_id = federation.start_run(kind, rounds=3)
    await complete(federation, run_id, agents)

    final = agents[0].theta(run_id)
    for agent in agents[1:]:
        assert np.array_equal(agent.theta(run_id), final)
    states = [trained.theta for trained in agents[0].engine.history] + [final]
    assert np.array_equal(states[0], federation.initial_theta())
    bound = quantisation_bound(SAMPLES, cap=128) + 2 * np.spacing(np.float32(1))
    for before, after in pairwise(states):
        expected = before + weighted_mean(agents, before)
        assert np.abs(after - expected).max() <= bound
        assert np.abs(after - before).max() > 1000 * bound, "the bound would prove nothing"

    if kind == "masked":  # the coordinator reads the sums, and nothing else
        command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
        assert np.array_equal(read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT), final)
        return
    with pytest.raises(ConfigError, match="never could read"):
        command("run", "export", "--out", tmp_path / "model", "--home", federation.home)
    assert not (tmp_path / "model").exists()


async def test_a_plain_run_with_sgd_needs_no_clip(federation: Federation) -> None:
    agents = await federation.enrol_all(SAMPLES)
    run_id = federation.start_run("plain", rounds=1, optimizer="sgd")
    await complete(federation, run_id, agents)
    initial = federation.initial_theta()
    expected = initial + weighted_mean(agents, initial)
    assert np.array_equal(agents[0].theta(run_id), expected)


@pytest.mark.parametrize("kind", ["plain", "encrypted", "sealed"])
async def test_the_store_knows_quality_and_bytes_of_every_round(
    federation: Federation, kind: str
) -> None:
    agents = await federation.enrol_all(SAMPLES)
    agents[0].engine.evaluation = None
    agents[1].engine.evaluation = two_classes(10, 10, 0.25)
    run_id = federation.start_run(kind, rounds=2)
    await complete(federation, run_id, agents)

    progress = json.loads(command("run", "watch", "--json", "--home", federation.home))
    assert [entry["round"] for entry in progress["history"]] == [1, 2]
    reports = federation.store.reports(run_id)
    assert all((row["training_loss"] is None) == (kind != "plain") for row in reports)
    sums = [record.sum.size_bytes for record in federation.store.rounds(run_id)]
    for entry, sum_bytes in zip(progress["history"], sums, strict=True):
        if kind == "plain":
            assert (entry["evaluated"], entry["accuracy"]) == (20, 17 / 20)
            assert entry["began_with"] is None
        else:  # weighed as updates are: 50 and 100 samples, and 30 without held-out rows
            assert (entry["evaluated"], entry["accuracy"]) == (0, None)
            expected = {"accuracy": 0.8, "macro_f1": 4 / 9, "loss": 62.5 / 150}
            assert entry["began_with"] == pytest.approx(expected, abs=1e-4)
        assert entry["training_loss"] == pytest.approx(0.25, abs=1e-4)
        assert entry["seconds"] > 0
        assert (entry["summed"], entry["saturated"], entry["saturated_share"]) == (3, 0, 0.0)
        assert entry["sent_bytes_per_agent"] >= 3 * PARAMETERS
        assert entry["received_bytes_per_agent"] >= sum_bytes
    assert [agent["progress"] for agent in progress["participants"]] == [1.0, 1.0, 1.0]


async def test_both_sides_describe_the_same_run(federation: Federation, tmp_path: Path) -> None:
    """The coordinator knows who took part, the device what it agreed to; the forms are the same."""
    agents = await federation.enrol_all(SAMPLES)
    run_id = federation.start_run("masked", rounds=2)
    await complete(federation, run_id, agents)
    await agents[0].stop()

    forms = ("--form", "onnx,safetensors")
    home = ("--home", federation.home)
    command("run", "export", "--out", tmp_path / "central", *forms, *home)
    central, device = tmp_path / "central", tmp_path / "device"
    code, out, err = await agent_command(agents[0].home, "export", "--out", str(device), *forms)
    assert (code, err) == (0, "")
    assert f"{device / 'safetensors'}: the trained values" in out
    name = "safetensors/trained.safetensors"
    assert (central / name).read_bytes() == (device / name).read_bytes()
    cards = [(folder / "README.md").read_text() for folder in (central, device)]
    privacy = json.loads(command("run", "privacy", "--json", *home))
    assumed = {party["learns"] for party in privacy["parties"] if party["party"] == "assuming"}
    for party in privacy["parties"]:
        line = f"| {party['party']} | {party['learns']} |"
        assert line in cards[0]
        assert line in cards[1] or party["learns"] in assumed
    for card in cards:
        assert f"| id | {run_id.hex()} |" in card
        assert "| protection | masked |" in card
        assert "| learning rate | " in card
    assert "| rounds | 2 of 2 |" in cards[0]
    assert "| 2 | 3 | 0.2500 | not known | not known | none | accuracy 0.7000, " in cards[0]
    assert not any(agent.name in card for agent in agents for card in cards)
