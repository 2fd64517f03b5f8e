"""An exported model on a labelled file, and what the engine finds from its own graphs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.data import DataSource
from edge_agent.model_quality import measure
from edge_agent.onnx_engine import OnnxEngine
from fedloom.exports import export_model
from fedloom.quality import local_quality, named
from tests.edge_agent.toy import Toy
from tests.edge_agent.toy_tasks import save_sums, save_tagger


@pytest.fixture
def exported(toy: Toy, tmp_path: Path) -> Path:
    export_model(toy.folder, toy.plan, toy.theta, tmp_path / "model")
    return tmp_path / "model"


def test_it_is_what_the_engine_finds(toy: Toy, exported: Path, held_out: DataSource) -> None:
    engine = OnnxEngine(toy.folder, toy.plan, held_out, held_out)
    evaluation = engine.evaluate(toy.theta)
    assert evaluation is not None
    found = measure(exported, held_out)
    assert found.labels == found.rows == evaluation.count
    expected = named(local_quality(evaluation, toy.plan.task), toy.plan.task)
    assert found.metrics == pytest.approx(expected, rel=1e-5)


def test_entities_of_a_tagger(tmp_path: Path) -> None:
    save_tagger(tmp_path / "model")
    rows = (
        {"words": ["New", "York", "at", "noon"], "tags": ["B-place", "I-place", "O", "B-time"]},
        {"words": ["Paris", "York"], "tags": ["B-place", "B-place"]},  # it finds one of two words
    )
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure(tmp_path / "model", DataSource(data))
    assert found.metrics["entity_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert found.metrics["accuracy"] == pytest.approx(5 / 6)


def test_errors_of_a_plan_of_values(tmp_path: Path) -> None:
    save_sums(tmp_path / "model")
    arrays = {
        "left": np.ones((3, 2, 3), np.float32),
        "right": np.array([1, 2, 3], np.float32),
        "label": np.array([[6, 10], [6, 20], [7, 28]], np.float32),  # the last is off by 1 and 2
    }
    np.savez(tmp_path / "test.npz", **arrays)
    found = measure(tmp_path / "model", DataSource(tmp_path / "test.npz"))
    assert found.metrics == {"mean_squared_error": pytest.approx((1 + 4) / 2 / 3)}


@pytest.mark.parametrize("before", [True, False])
def test_the_command_prints_it(exported: Path, held_out: DataSource, before: bool) -> None:
    words = ["evaluate", "--model", str(exported), "--data", str(held_out.path)]
    given = ["--json", *words] if before else [*words, "--json"]
    command = [sys.executable, "-m", "edge_agent.app", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["metrics"] == measure(exported, held_out).metrics


def test_the_command_needs_one_file(exported: Path) -> None:
    command = [sys.executable, "-m", "edge_agent.app", "evaluate", "--model", str(exported)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--data" in done.stderr
