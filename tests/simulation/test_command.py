"""`fedloom-coordinator simulate`, killed and started again, alone and in several processes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator.app import app
from edge_agent.examples import read_examples
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.plans import ADAPTER_FILE, Role
from fedloom.terms import LocalTraining
from simulation.movers import Journey
from simulation.plan_mover import PlanMover
from tests.edge_agent import toy

RUN = """
name = "toy"
plan = "plan"
rounds = {rounds}
[cohort]
size = {size}
[training]
{training}
[protection]
kind = "{kind}"
"""
SCAFFOLD = 'strategy = "scaffold"\noptimizer = "sgd"\nweighting = "uniform"\nmax_steps = 4'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy.save_toy(tmp_path / "plan")
    toy.write_rows(tmp_path / "data.csv", toy.toy_rows(240, seed=1))
    toy.write_rows(tmp_path / "test.csv", toy.toy_rows(60, seed=2))
    return tmp_path


def write_run(
    folder: Path, rounds: int = 3, kind: str = "plain", size: int = 8, training: str = ""
) -> None:
    text = RUN.format(rounds=rounds, kind=kind, size=size, training=training)
    if training == SCAFFOLD:
        text = text.replace("[training]", "population = 24\n[training]")
    (folder / "run.toml").write_text(text)


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    files = "--data", str(folder / "data.csv"), "--held-out", str(folder / "test.csv")
    where = "--out", str(folder / out)
    return ["simulate", str(folder / "run.toml"), "--agents", "24", *files, *where, "--json", *more]


def simulated(folder: Path, out: str, *more: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, arguments(folder, out, *more))
    if result.exception is not None:
        raise result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def timeless(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return what was told, without times and places."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "model")} for line in lines]


@pytest.mark.parametrize("terms", [LocalTraining(learning_rate=0.01, epochs=2, batch_size=7)])
def test_a_virtual_client_moves_as_an_agent_does(folder: Path, terms: LocalTraining) -> None:
    made = toy.Toy(folder / "plan", *_plan(folder))
    source = toy.write_rows(folder / "own.csv", toy.toy_rows(33, seed=5))
    agent = OnnxEngine(made.folder, made.plan, source, None, threads=1)
    update = agent.train(made.theta, terms, 17, lambda share: None, toy.Unkept())
    held, _ = read_examples(made.folder, made.plan, source)
    mover = PlanMover(made.folder, made.plan, {"one": held})
    (moved,) = mover.move([Journey("one", 17, made.theta)], terms, None)
    np.testing.assert_array_equal(moved.delta, update.delta)
    assert (moved.samples, moved.mean_loss) == (update.samples, update.mean_loss)


def _plan(folder: Path):
    from fedloom.plans import load_plan

    plan = load_plan(folder / "plan")
    return plan, read_adapter(folder / "plan" / ADAPTER_FILE, plan.layout)


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3"])
def test_any_number_of_workers_tells_the_same(folder: Path, partition: str) -> None:
    write_run(folder)
    alone = simulated(folder, "alone", "--workers", "1", "--partition", partition)
    two = simulated(folder, "two", "--workers", "2", "--partition", partition)
    assert timeless(alone) == timeless(two)
    assert len(alone) == 4
    model = folder / "alone" / "model" / ADAPTER_FILE
    assert model.read_bytes() == (folder / "two" / "model" / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize(
    ("kind", "training"), [("plain", SCAFFOLD), ("sealed", ""), ("plain", 'lora = "fedsa"')]
)
def test_a_killed_run_goes_on_to_the_same_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, training: str
) -> None:
    if "lora" in training:  # what each client keeps is tried after every round
        shutil.rmtree(folder / "plan")
        roles = (Role.LORA_A, Role.LORA_B)
        layout = [replace(one, role=role) for one, role in zip(toy.LAYOUT, roles, strict=True)]
        monkeypatch.setattr(toy, "LAYOUT", tuple(layout))
        toy.save_toy(folder / "plan")
    write_run(folder, rounds=14, kind=kind, training=training)
    whole = simulated(folder, "whole", "--workers", "1")
    kills = 0
    for _ in range(2):
        program = "import sys; from coordinator.app import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments(folder, "cut", "--workers", "2")],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(3):  # somewhere in the round after the next lines
            process.stdout.readline()
        time.sleep(0.01 * kills)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills == 2
    rest = simulated(folder, "cut", "--workers", "1")
    assert 1 < len(rest) < len(whole)
    assert timeless(rest) == timeless(whole)[-len(rest) :]
    journals = [(folder / out / "journal.jsonl").read_text() for out in ("whole", "cut")]
    assert journals[0] == journals[1]


def test_a_column_makes_the_clients(folder: Path) -> None:
    write_run(folder, size=3)
    lines = simulated(folder, "out", "--partition", "by:label", "--agents", "3")
    assert [line["clients"] for line in lines[:-1]] == [3, 3, 3]
    with pytest.raises(ConfigError, match="3 values of label"):
        simulated(folder, "other", "--partition", "by:label")


def test_another_run_does_not_go_on_in_the_folder(folder: Path) -> None:
    write_run(folder)
    simulated(folder, "out")
    write_run(folder, rounds=4)
    with pytest.raises(ConfigError, match="found another's"):
        simulated(folder, "out")


def test_everything_wrong_with_a_run_is_told(folder: Path) -> None:
    write_run(folder, rounds=0, size=0)
    with pytest.raises(ConfigError, match=r"rounds.*cohort"):
        simulated(folder, "out")
    write_run(folder)
    with pytest.raises(ConfigError, match="engine"):
        simulated(folder, "out", "--engine", "cloud")


@pytest.mark.slow
def test_ray_computes_what_one_process_does(folder: Path) -> None:
    pytest.importorskip("ray")
    write_run(folder, training=SCAFFOLD)
    alone = simulated(folder, "alone", "--workers", "1")
    process = subprocess.run(
        [
            *(sys.executable, "-c", "from coordinator.app import main; main()"),
            *arguments(folder, "ray", "--engine", "ray", "--workers", "2"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert timeless(lines) == timeless(alone)
