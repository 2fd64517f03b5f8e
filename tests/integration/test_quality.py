"""Quality in real rounds: what the coordinator hears of it, and when it ends a run."""

import json
import shutil

import pytest

from edge_agent.data import DataSource
from edge_agent.model_quality import measure
from fedloom.errors import ConfigError
from fedloom.quality import Report
from tests.edge_agent.toy import save_toy, toy_rows, write_rows
from tests.integration.engines import two_classes
from tests.integration.federation import Federation, command
from tests.integration.test_rounds import SAMPLES, complete


def start_run(federation: Federation, kind: str, evaluation: str, rounds: int = 2) -> bytes:
    file = federation.folder / "run.toml"
    file.write_text(
        f'name = "toy"\nplan = "plan"\nrounds = {rounds}\n[cohort]\nminimum = 3\nsize = 10\n'
        f'[training]\nlearning_rate = 1e-2\n[protection]\nkind = "{kind}"\n'
        f"[evaluation]\n{evaluation}\n"
    )
    return bytes.fromhex(command("run", "start", file, "--home", federation.home))


def watched(federation: Federation) -> dict:
    return json.loads(command("run", "watch", "--json", "--home", federation.home))


async def test_a_plateau_ends_the_run_and_everyone_has_its_model(federation: Federation) -> None:
    agents = await federation.enrol_all(SAMPLES)
    run_id = start_run(federation, "sealed", "patience = 2\nminimum_delta = 0.01", rounds=9)
    await complete(federation, run_id, agents)
    told = "loss got no better by more than 0.01 in the last 2 rounds"
    [row] = json.loads(command("run", "list", "--json", "--home", federation.home))
    assert (row["phase"], row["completed"], row["rounds"]) == ("completed", 3, 9)
    assert (row["reason"], row["early_end"]) == (None, told)
    assert "completed early" in command("run", "list", "--home", federation.home)
    drawn = command("run", "watch", "--home", federation.home)
    assert told in " ".join(drawn.split())
    assert "began with accuracy 70.0%" in drawn
    assert len({agent.theta(run_id).tobytes() for agent in agents}) == 1


async def test_without_being_told_the_coordinator_hears_nothing(federation: Federation) -> None:
    agents = await federation.enrol_all(SAMPLES)
    run_id = start_run(federation, "sealed", "tell = false")
    await complete(federation, run_id, agents)
    for entry in watched(federation)["history"]:
        assert (entry["began_with"], entry["accuracy"], entry["training_loss"]) == (None,) * 3


async def test_each_device_s_own_quality_is_told_where_all_permit_it(
    federation: Federation,
) -> None:
    agents = await federation.enrol_all(SAMPLES)
    agents[2].engine.evaluation = two_classes(20, 20, 0.1)
    for agent in agents:
        agent.permitted_report = Report.EACH
    run_id = start_run(federation, "sealed", 'report = "each"')
    await complete(federation, run_id, agents)
    progress = watched(federation)
    assert [entry["accuracy"] for entry in progress["history"]] == [34 / 40] * 2
    assert {agent["accuracy"] for agent in progress["participants"]} == {0.7, 1.0}


async def test_devices_that_do_not_permit_it_decline(federation: Federation) -> None:
    agents = await federation.enrol_all(SAMPLES)
    run_id = start_run(federation, "sealed", 'report = "each"\n[deadlines]\ngathering = 1')
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    rows = federation.store.reports(run_id)
    assert {row["agent_id"] for row in rows if row["refusal"]} == {a.name for a in agents}
    assert all(row["evaluated"] is None for row in rows)


@pytest.mark.parametrize("kind", ["plain", "masked"])
async def test_the_coordinator_measures_a_model_that_it_can_read(
    federation: Federation, kind: str
) -> None:
    shutil.rmtree(federation.folder / "plan")
    save_toy(federation.folder / "plan")
    agents = await federation.enrol_all(SAMPLES)
    for agent in agents:
        agent.engine.evaluation = None
    run_id = start_run(federation, kind, 'report = "mean"')
    await complete(federation, run_id, agents)
    data: DataSource = write_rows(federation.folder / "test.csv", toy_rows(40, seed=3))
    options = ("--data", data.path, "--home", federation.home)
    found = json.loads(command("run", "evaluate", run_id.hex(), *options, "--json"))
    expected = measure(agents[0].model(run_id), data)
    assert found["metrics"] == pytest.approx(expected.metrics)
    assert (found["run"], found["rows"]) == (run_id.hex(), 40)
    with pytest.raises(ConfigError, match="nowhere"):
        command("run", "evaluate", run_id.hex(), *options, "--label", "nowhere")
