"""`fedloom-coordinator tune`: trials are simulations, and the best file says what was simulated."""

import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("optuna")

from coordinator.app import app
from fedloom.errors import ConfigError
from simulation.search_results import with_values
from tests.edge_agent import toy

RUN = """# What we always had.
name = "toy"
plan = "plan"
rounds = 4
cohort.size = 6
[training]
learning_rate = 1e-4 # low
[protection]
kind = "plain"
"""
SPACE = '"training.learning_rate" = {low = 1e-4, high = 1.0, log = true}\n'
MORE = SPACE + '"training.epochs" = {low = 1, high = 3}\n"training.batch_size" = [8, 16]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy.save_toy(tmp_path / "plan")
    toy.write_rows(tmp_path / "data.csv", toy.toy_rows(240, seed=1))
    toy.write_rows(tmp_path / "test.csv", toy.toy_rows(60, seed=2))
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    files = "--data", str(folder / "data.csv"), "--held-out", str(folder / "test.csv")
    where = "--space", str(folder / "space.toml"), "--out", str(folder / out)
    return ["tune", str(folder / "run.toml"), "--agents", "12", *files, *where, "--json", *more]


def tuned(folder: Path, space: str, out: str, *more: str) -> list[dict]:
    (folder / "space.toml").write_text(space)
    return invoked(*arguments(folder, out, *more))


def invoked(*words: str) -> list[dict]:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None:
        raise result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def told(folder: Path, out: str) -> list[dict]:
    """Return what is kept of the trials, without times."""
    lines = (folder / out / "trials.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_the_best_file_is_simulated_to_the_value_that_was_told(folder: Path) -> None:
    *trials, last = tuned(folder, MORE, "out", "--trials", "9", "--metric", "loss")
    best = folder / "out" / "best.toml"
    assert last["file"] == str(best)
    assert [trial["number"] for trial in trials] == list(range(1, 10))
    assert trials[0]["parameters"]["training.learning_rate"] > 1e-4  # the file says no epochs
    finished = [trial for trial in trials if trial["state"] == "finished"]
    assert last["value"] == min(trial["values"][-1] for trial in finished)
    assert sum(trial["state"] == "stopped" and len(trial["values"]) < 4 for trial in trials) >= 1
    (folder / "elsewhere").mkdir()
    text = best.read_text()
    (folder / "elsewhere" / "run.toml").write_text(text)
    chosen = trials[last["best"] - 1]["parameters"]
    wanted = tomllib.loads(with_values(RUN, {**chosen, "plan": str(folder / "plan")}))
    assert tomllib.loads(text) == wanted
    assert "# What we always had." in text
    assert f"trial {last['best']}" in text
    lines = invoked(
        *("simulate", str(folder / "elsewhere" / "run.toml"), "--agents", "12", "--json"),
        *("--data", str(folder / "data.csv"), "--held-out", str(folder / "test.csv")),
    )
    assert lines[-2]["evaluation"]["mean_loss"] == last["value"]
    table = (folder / "out" / "results.md").read_text()
    assert f"| {last['best']} | finished |" in table.splitlines()[4]


def test_the_file_as_it_is_comes_first(folder: Path) -> None:
    trials = tuned(folder, SPACE, "out", "--trials", "2", "--metric", "macro_f1")
    assert trials[0]["parameters"] == {"training.learning_rate": 1e-4}
    assert trials[-1]["metric"] == "macro_f1"


def test_what_cannot_be_combined_is_a_trial_with_its_reason(folder: Path) -> None:
    space = '"protection.kind" = ["plain", "sealed"]\n"cohort.minimum" = [2, 20]\n'
    *trials, last = tuned(folder, space, "out", "--trials", "9")
    reasons = {
        (t["parameters"]["protection.kind"], t["parameters"]["cohort.minimum"]): t["reason"]
        for t in trials
        if t["state"] == "refused"
    }
    assert last["trials"]["refused"] == sum(t["state"] == "refused" for t in trials) >= 1
    assert all("cohort" in reason for reason in reasons.values())
    assert ("plain", 2) not in reasons
    with pytest.raises(ConfigError, match="all are refused: cohort"):
        tuned(folder, '"cohort.minimum" = [20]', "none", "--trials", "3")


def test_everything_wrong_is_told_before_the_first_trial(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.speed: unknown key.*cohort.size: expected"):
        tuned(folder, '"training.speed" = [1]\n"cohort.size" = ["a"]', "out")
    for more, problem in (
        (("--metric", "entity_f1"), "metric: expected one of accuracy, macro_f1, loss, perplexity"),
        (("--pruner", "hyperband"), "pruner"),
        (("--trials", "0"), "trials"),
        (("--partition", "by"), "partition"),
    ):
        with pytest.raises(ConfigError, match=problem):
            tuned(folder, SPACE, "out", *more)
    assert not (folder / "out" / "study.jsonl").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_table(folder: Path) -> None:
    tuned(folder, MORE, "whole", "--trials", "14", "--jobs", "2")
    program = "import sys; from coordinator.app import main; main()"
    words = arguments(folder, "cut", "--trials", "14", "--jobs", "2")
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    rest = invoked(*words)
    assert 1 < len(rest) <= 14 - 5 + 1
    assert told(folder, "cut") == told(folder, "whole")
    bests = [tomllib.loads((folder / out / "best.toml").read_text()) for out in ("whole", "cut")]
    assert bests[0] == bests[1]
