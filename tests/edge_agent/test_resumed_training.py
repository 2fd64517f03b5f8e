"""Training on the toy plan: a killed training's update is an undisturbed one's, bit by bit."""

import errno
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.checkpoints import INTERVAL_SECONDS, Checkpoint
from edge_agent.data import DataSource
from edge_agent.engine import LocalUpdate
from edge_agent.onnx_engine import OnnxEngine
from fedloom.graph_contracts import TRAIN_GRAPH
from fedloom.strategies import RULES
from fedloom.terms import LocalTraining, Optimizer, Schedule, Strategy, steps_of
from tests.edge_agent.test_checkpoints import FILE, HEADER, ROUND, RUN, Clock, failing
from tests.edge_agent.toy import Toy, Unkept, save_toy, toy_rows, write_rows
from tests.strategies.samples import NEEDED, terms_of

ROWS = 24
Bits = tuple[bytes, str, int]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the product may catch it."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return save_toy(tmp_path_factory.mktemp("toy") / "plan")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return write_rows(tmp_path_factory.mktemp("data") / "train.csv", toy_rows(ROWS, seed=1))


_amounts = st.fixed_dictionaries(
    {"epochs": st.integers(1, 3), "max_steps": st.sampled_from([0, 4, 30])}
) | st.fixed_dictionaries({"local_steps": st.sampled_from([1, 3, 10, 40])})


@st.composite
def trainings(draw: st.DrawFn) -> LocalTraining:
    strategy = draw(st.sampled_from(Strategy))
    changes: dict[str, Any] = {
        "optimizer": draw(st.sampled_from(Optimizer)),
        "batch_size": draw(st.sampled_from([1, 5, 7, 12, ROWS, 40])),  # with and without a rest
        "learning_rate": 0.05,
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
        "gradient_clip": draw(st.sampled_from([0.0, 0.1])),
        "step_schedule": draw(st.sampled_from(Schedule)),
        "warmup_steps": draw(st.integers(0, 5)),
        **draw(_amounts),
    }
    if strategy is Strategy.FED_PROX:
        changes["proximal_mu"] = 0.5
    return terms_of(strategy, **(changes | NEEDED.get(strategy, {})))


def bits(update: LocalUpdate) -> Bits:
    """Return everything of an update that the coordinator learns something of."""
    return update.delta.tobytes(), update.mean_loss.hex(), update.samples


def train(
    toy: Toy,
    data: DataSource,
    terms: LocalTraining,
    checkpoint: Checkpoint,
    progress: Callable[[float], None] = lambda _: None,
) -> LocalUpdate:
    """Train as a process does that has just been started."""
    engine = OnnxEngine(toy.folder, toy.plan, data, None, threads=1)
    linear = None
    if RULES[terms.strategy].remembers:
        linear = np.linspace(-1, 1, len(toy.theta), dtype=np.float32)
    return engine.train(toy.theta, terms, 9, progress, checkpoint, linear)


@given(
    trainings(), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([1, 7, 25])
)
@settings(max_examples=60)
def test_an_update_does_not_depend_on_where_its_training_was_killed(
    toy: Toy, data: DataSource, terms: LocalTraining, lives: list[int], seconds: int
) -> None:
    """`lives` are the steps after which processes die; a step takes `seconds`."""
    steps = steps_of(terms, ROWS)
    reached = 0
    with TemporaryDirectory() as name:
        for life in [*lives, 10_000]:
            clock = Clock()
            shares: list[float] = []

            def progress(share: float) -> None:
                clock.now += seconds  # noqa: B023 - called within this turn alone
                shares.append(share)  # noqa: B023
                if len(shares) > life:  # noqa: B023
                    raise Killed

            checkpoint = Checkpoint(Path(name), RUN, ROUND, clock)
            with suppress(Killed):
                update = train(toy, data, terms, checkpoint, progress)
            first_step = round(shares[0] * steps)
            assert (reached - first_step) * seconds <= INTERVAL_SECONDS + 2 * seconds
            reached = round(shares[-1] * steps)
    assert bits(update) == bits(train(toy, data, terms, Unkept()))


def test_a_finished_training_is_not_trained_again(
    toy: Toy, data: DataSource, tmp_path: Path
) -> None:
    terms = LocalTraining(epochs=2)
    expected = train(toy, data, terms, Checkpoint(tmp_path, RUN, ROUND))
    assert (tmp_path / FILE).stat().st_size == HEADER.size + 4 * len(toy.theta) + 32
    folder = tmp_path / "without-graph"
    shutil.copytree(toy.folder, folder)
    (folder / TRAIN_GRAPH).unlink()
    shares: list[float] = []
    again = train(
        replace(toy, folder=folder), data, terms, Checkpoint(tmp_path, RUN, ROUND), shares.append
    )
    assert bits(again) == bits(expected)
    assert shares == [1.0]


def test_changed_data_start_anew(toy: Toy, tmp_path: Path) -> None:
    terms = LocalTraining()
    rows = toy_rows(ROWS, seed=2)
    data = write_rows(tmp_path / "train.csv", rows)
    train(toy, data, terms, Checkpoint(tmp_path, RUN, ROUND))
    changed = write_rows(tmp_path / "train.csv", [*rows[1:], ("lamp", "lights")])
    update = train(toy, changed, terms, Checkpoint(tmp_path, RUN, ROUND))
    assert bits(update) == bits(train(toy, changed, terms, Unkept()))


def test_a_disk_that_takes_nothing_costs_the_training_nothing(
    toy: Toy, data: DataSource, tmp_path: Path
) -> None:
    terms = LocalTraining()
    with failing("replace", errno.ENOSPC, Path):
        update = train(toy, data, terms, Checkpoint(tmp_path, RUN, ROUND))
    assert bits(update) == bits(train(toy, data, terms, Unkept()))
    assert not list(tmp_path.iterdir())


def test_what_the_device_remembers_is_part_of_what_it_goes_on_from(
    toy: Toy, data: DataSource, tmp_path: Path
) -> None:
    terms = terms_of(Strategy.FED_DYN, batch_size=8)

    def trained(value: float, checkpoint: Checkpoint) -> LocalUpdate:
        engine = OnnxEngine(toy.folder, toy.plan, data, None, threads=1)
        linear = np.full(len(toy.theta), value, np.float32)
        return engine.train(toy.theta, terms, 9, lambda _: None, checkpoint, linear)

    trained(0.1, Checkpoint(tmp_path, RUN, ROUND))
    after = trained(0.2, Checkpoint(tmp_path, RUN, ROUND))
    assert bits(after) == bits(trained(0.2, Unkept())) != bits(trained(0.1, Unkept()))


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_local_steps_are_made_whatever_the_number_of_samples(
    toy: Toy, data: DataSource, steps: int
) -> None:
    shares: list[float] = []
    terms = LocalTraining(local_steps=steps, batch_size=8)
    train(toy, data, terms, Unkept(), shares.append)
    np.testing.assert_allclose(shares, np.arange(1, steps + 1) / steps)
