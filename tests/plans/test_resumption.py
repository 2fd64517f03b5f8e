"""Real graphs give equal bits again in a new session: a training may go on where another ended."""

from pathlib import Path

import pytest

from edge_agent.checkpoints import Checkpoint
from edge_agent.data import DataSource
from edge_agent.onnx_engine import OnnxEngine
from fedloom.adapters import read_adapter
from fedloom.plans import ADAPTER_FILE
from fedloom.terms import LocalTraining
from tests.edge_agent.toy import write_rows
from tests.plans.conftest import TEXT

ROWS, STEPS = 22, 6


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["small", "minilm"])
def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(
    name: str,
    threads: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_agent.checkpoints.INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("edge_agent.checkpoints.PAUSE_PER_SAVE", 0.0)
    built = request.getfixturevalue(name)
    words, labels = TEXT.split(), built.plan.task.labels
    rows = [(" ".join(words[i % 7 : i % 7 + 3 + i]), labels[i % 4]) for i in range(ROWS)]
    data = write_rows(tmp_path / "train.csv", rows)

    def kill_at(last: int) -> None:
        with pytest.raises(Killed):
            train(built, data, threads, tmp_path / "killed", last)

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    kill_at(2)
    kill_at(5)
    found = train(built, data, threads, tmp_path / "killed", STEPS + 1)
    assert found == train(built, data, threads, tmp_path / "whole", STEPS + 1)


def train(built, data: DataSource, threads: int, folder: Path, last: int) -> tuple[bytes, float]:
    """Train two epochs in a new engine, to the step `last` at most; return what came of it."""

    def progress(share: float) -> None:
        if round(share * STEPS) == last:
            raise Killed

    engine = OnnxEngine(built.folder, built.plan, data, None, threads=threads)
    theta = read_adapter(built.folder / ADAPTER_FILE, built.plan.layout)
    terms = LocalTraining(epochs=2, batch_size=8)
    update = engine.train(theta, terms, 1, progress, Checkpoint(folder, bytes(16), 1))
    return update.delta.tobytes(), update.mean_loss
