"""The best file of a search starts a real run, from wherever it lies."""

import shutil
import threading

import pytest
from typer.testing import CliRunner

pytest.importorskip("optuna")

from coordinator.app import app
from coordinator.run_state import Phase
from edge_agent.onnx_engine import OnnxEngine
from tests.edge_agent import toy
from tests.integration.federation import Federation, command

RUN = """
name = "toy"
plan = "plan"
rounds = 2
[cohort]
minimum = 3
size = 3
[training]
learning_rate = 1e-4
"""


async def test_the_best_file_starts_a_run(federation: Federation) -> None:
    folder = federation.folder
    shutil.rmtree(folder / "plan")
    made = toy.save_toy(folder / "plan")
    for name in ("data", "test"):
        toy.write_rows(folder / f"{name}.csv", toy.toy_rows(60, seed=len(name)))
    (folder / "run.toml").write_text(RUN)
    (folder / "space.toml").write_text(
        'training.learning_rate = {low = 1e-3, high = 0.1, log = true}\nprotection.kind = ["plain"]'
    )
    words = ["tune", folder / "run.toml", "--space", folder / "space.toml", "--agents", "3"]
    words += ["--data", folder / "data.csv", "--held-out", folder / "test.csv", "--trials", "2"]
    found = CliRunner().invoke(app, list(map(str, words)))
    assert found.exception is None, found.exception
    agents = await federation.enrol_all()
    for number, agent in enumerate(agents):
        rows = toy.write_rows(folder / f"data-{number}.csv", toy.toy_rows(20, seed=number))
        agent.engine = OnnxEngine(folder / "plan", made.plan, rows, None, threads=1)
        agent.engine.may_finish = threading.Event()  # which the fixture sets at the end
    best = folder / "run.tuning" / "best.toml"
    run_id = bytes.fromhex(command("run", "start", best, "--home", federation.home))
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    assert federation.run(run_id).phase is Phase.COMPLETED
