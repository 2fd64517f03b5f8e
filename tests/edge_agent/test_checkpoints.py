"""A checkpoint: whole, of this very training, for its owner alone, or not there; and its cost."""

import errno
import hashlib
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.checkpoints import (
    INTERVAL_SECONDS,
    PAUSE_PER_SAVE,
    Checkpoint,
    TrainingState,
    discard_checkpoint,
    training_subject,
)
from fedloom.terms import LocalTraining, Optimizer, Schedule, Strategy, Weighting

RUN, ROUND = bytes(range(16)), 3
FILE = "training.checkpoint"
HEADER = struct.Struct("<8s16sQ32sQQQddd")  # as the module's docstring states it
P = 5


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def kept_state(step: int = 2) -> TrainingState:
    """Return a state in the middle of a training of four steps, or at its end."""
    vectors = np.random.default_rng(1).standard_normal((3, P)).astype(np.float32)
    return TrainingState(bytes(32), 4, tuple(vectors), step, 1.5, 8.0)


def fresh_state() -> TrainingState:
    """Return the state that such a training begins with."""
    return TrainingState(bytes(32), 4, tuple(np.zeros((3, P), np.float32)))


def write(folder: Path, state: TrainingState) -> bytes:
    """Save the state whatever the time is; return the file's bytes."""
    save(folder, state)
    return (folder / FILE).read_bytes()


def save(folder: Path, state: TrainingState) -> None:
    """Save the state whatever the time is."""
    clock = Clock()
    checkpoint = Checkpoint(folder, RUN, ROUND, clock)
    clock.now = INTERVAL_SECONDS
    checkpoint.save(state)


def is_loaded(folder: Path) -> bool:
    """Tell whether a process that is started now goes on from a kept state."""
    fresh = fresh_state()
    state = Checkpoint(folder, RUN, ROUND).load(fresh)
    assert state is fresh or state.step == 2
    return state is not fresh


def test_time_is_counted_over_all_processes(tmp_path: Path) -> None:
    clock = Clock()
    first = Checkpoint(tmp_path, RUN, ROUND, clock)
    clock.now = 30.0
    first.save(kept_state())
    clock.now = 1000.0
    second = Checkpoint(tmp_path, RUN, ROUND, clock)
    second.load(fresh_state())
    clock.now = 1005.0
    assert second.seconds == 35.0


# what it is bound to

TERMS = LocalTraining(strategy=Strategy.FED_PROX, proximal_mu=0.1)
OTHER_TERMS = [
    replace(TERMS, **{name: value})
    for name, value in {
        "optimizer": Optimizer.SGD,
        "epochs": 2,
        "batch_size": 17,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "momentum": 0.5,
        "proximal_mu": 0.2,
        "server_learning_rate": 0.5,
        "seed": 1,
        "weighting": Weighting.UNIFORM,
        "local_steps": 3,
        "max_steps": 3,
        "gradient_clip": 1.0,
        "step_schedule": Schedule.COSINE,
        "warmup_steps": 1,
    }.items()
]


def test_a_subject_is_of_one_training_alone() -> None:
    theta = np.linspace(-1, 1, P).astype(np.float32)
    nudged = theta.copy()
    nudged[-1] = np.nextafter(nudged[-1], np.float32(2))
    subjects = {
        training_subject(theta, TERMS, 5, bytes(32)),
        training_subject(nudged, TERMS, 5, bytes(32)),
        training_subject(theta[:-1], TERMS, 5, bytes(32)),
        training_subject(theta, TERMS, 6, bytes(32)),
        training_subject(theta, TERMS, 5, bytes(31) + b"\1"),
        training_subject(theta, LocalTraining(), 5, bytes(32)),
        training_subject(theta, TERMS, 5, bytes(32), theta),
        training_subject(theta, TERMS, 5, bytes(32), nudged),
        *(training_subject(theta, terms, 5, bytes(32)) for terms in OTHER_TERMS),
    }
    assert len(subjects) == 8 + len(OTHER_TERMS)
    assert training_subject(theta.copy(), replace(TERMS), 5, bytes(32)) in subjects


@pytest.mark.parametrize(
    ("run_id", "round_number", "fresh"),
    [
        (bytes(16), ROUND, fresh_state()),
        (RUN, ROUND + 1, fresh_state()),
        (RUN, ROUND, replace(fresh_state(), subject=b"\1" * 32)),
        (RUN, ROUND, replace(fresh_state(), steps=1)),
        (RUN, ROUND, replace(fresh_state(), vectors=tuple(np.zeros((3, P + 1), np.float32)))),
        (RUN, ROUND, replace(fresh_state(), vectors=tuple(np.zeros((2, P), np.float32)))),
    ],
    ids=["run", "round", "subject", "steps", "parameters", "vectors"],
)
def test_a_state_of_another_training_is_not_taken_up_and_not_left_behind(
    tmp_path: Path, run_id: bytes, round_number: int, fresh: TrainingState
) -> None:
    write(tmp_path, kept_state())
    assert Checkpoint(tmp_path, run_id, round_number).load(fresh) is fresh
    assert not list(tmp_path.iterdir())


# the file


@pytest.mark.parametrize("step", [2, 4])
def test_what_is_saved_is_loaded(tmp_path: Path, step: int) -> None:
    saved = kept_state(step)
    write(tmp_path, saved)
    loaded = Checkpoint(tmp_path, RUN, ROUND).load(fresh_state())
    assert loaded.step == step
    assert (loaded.loss_sum, loaded.weight_sum) == (1.5, 8.0)
    assert len(loaded.vectors) == (3 if step == 2 else 1)
    for found, expected in zip(loaded.vectors, saved.vectors, strict=False):
        assert found.dtype == np.float32
        assert found.flags.writeable
        assert found.tobytes() == expected.tobytes()


def test_without_a_file_a_training_begins(tmp_path: Path) -> None:
    assert not is_loaded(tmp_path)
    assert not is_loaded(tmp_path / "nowhere")


def test_a_file_with_any_bit_flipped_or_any_byte_missing_is_ignored(tmp_path: Path) -> None:
    whole = write(tmp_path, kept_state())
    others = [whole + b"\0", whole * 2, bytes(len(whole)), b"\xff" * len(whole)]
    others += [whole[:length] for length in range(len(whole))]
    for place, byte in enumerate(whole):
        others += [whole[:place] + bytes([byte ^ bit]) + whole[place + 1 :] for bit in (1, 128)]
    for content in others:
        (tmp_path / FILE).write_bytes(content)
        assert not is_loaded(tmp_path)
        assert not (tmp_path / FILE).exists()
    (tmp_path / FILE).write_bytes(whole)
    assert is_loaded(tmp_path)


U64 = st.one_of(st.integers(0, 6), st.integers(0, 2**64 - 1))


@given(U64, U64, U64, st.floats(), st.floats(), st.floats(), st.integers(0, 4))
def test_a_header_that_lies_under_a_right_digest_is_ignored(
    parameters: int,
    count: int,
    step: int,
    loss: float,
    weight: float,
    seconds: float,
    vectors: int,
) -> None:
    header = HEADER.pack(
        b"FDLCKPT\1", RUN, ROUND, bytes(32), parameters, count, step, loss, weight, seconds
    )
    content = header + bytes(4 * P * vectors)
    with TemporaryDirectory() as name:
        (Path(name) / FILE).write_bytes(content + hashlib.sha256(content).digest())
        fresh = fresh_state()
        state = Checkpoint(Path(name), RUN, ROUND).load(fresh)
    honest = parameters == P and count == vectors == {1: 3, 2: 3, 3: 3, 4: 1}.get(step)
    usable = np.isfinite([loss, weight, seconds]).all() and weight > 0 and seconds >= 0
    assert (state is not fresh) == (honest and usable)


@pytest.mark.parametrize("what", ["folder", "unreadable"])
def test_what_cannot_be_read_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "folder":
        (tmp_path / FILE / "inside").mkdir(parents=True)
    else:
        write(tmp_path, kept_state())

        def broken(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(np, "fromfile", broken)
    assert not is_loaded(tmp_path)


def test_a_checkpoint_is_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = Path.replace
    modes: list[int] = []

    def watched(self: Path, target: Path) -> Path:
        modes.append(self.stat().st_mode & 0o777)
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    before = os.umask(0)
    try:
        write(tmp_path, kept_state())
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_discarding_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, kept_state())
    (tmp_path / f"{FILE}.part").write_bytes(b"half")
    discard_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())
    discard_checkpoint(tmp_path)


# torn writes


@contextmanager
def failing(name: str, code: int, where: object = os) -> Iterator[None]:
    """Let a function of the system fail."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(where, name, fail)
        yield


@pytest.mark.parametrize(
    ("name", "code", "where"),
    [("fsync", errno.ENOSPC, os), ("replace", errno.EIO, Path), ("open", errno.EROFS, os)],
    ids=["full", "rename", "read-only"],
)
def test_a_save_that_fails_leaves_the_older_state(
    tmp_path: Path, name: str, code: int, where: object
) -> None:
    older = write(tmp_path, kept_state())
    with failing(name, code, where):
        assert write(tmp_path, replace(kept_state(), step=3)) == older
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert is_loaded(tmp_path)


@given(st.binary(max_size=400), st.integers(0, 300))
@settings(max_examples=30)
def test_a_write_that_was_cut_anywhere_leaves_the_older_state_usable(
    garbage: bytes, cut: int
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        newer = write(folder, replace(kept_state(), step=3))
        write(folder, kept_state())
        part = folder / f"{FILE}.part"
        for content in (newer[:cut], garbage):
            part.write_bytes(content)
            assert is_loaded(folder)
        assert write(folder, replace(kept_state(), step=3)) == newer
        assert not part.exists()


DYING = """
import os, signal, sys
from pathlib import Path
from tests.edge_agent.test_checkpoints import kept_state, write
from dataclasses import replace
folder, name = Path(sys.argv[1]), sys.argv[2]
write(folder, kept_state())
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
setattr({"fsync": os, "replace": Path, "unlink": Path}[name], name, die)
write(folder, replace(kept_state(), step=3))
"""


@pytest.mark.parametrize("name", ["unlink", "fsync", "replace"])
def test_a_process_killed_while_it_saves_leaves_the_older_state(tmp_path: Path, name: str) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), name])
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / f"{FILE}.part").exists() == (name != "unlink")
    assert is_loaded(tmp_path)


# what it costs


@given(st.lists(st.tuples(st.floats(1.0, 100.0), st.floats(0.0, 3.0)), min_size=20, max_size=60))
def test_saving_takes_a_hundredth_of_the_time_but_for_one_save(
    steps: list[tuple[float, float]],
) -> None:
    """`steps` are seconds of a step and of a save after it, were one made: any disk, any load."""
    clock, saves, unsaved = Clock(), [0.0], 0.0
    checkpoint = Checkpoint(Path(), RUN, ROUND, clock)
    state = replace(kept_state(1), steps=10_000)
    trained = 0.0
    with pytest.MonkeyPatch.context() as patched:
        for seconds, disk in steps:

            def slow(*_: object) -> None:
                clock.now += disk  # noqa: B023 - called within this turn alone
                saves.append(disk)  # noqa: B023

            patched.setattr("edge_agent.checkpoints.write_secret", slow)
            clock.now += seconds
            trained += seconds
            unsaved += seconds
            before = len(saves)
            checkpoint.save(state)
            if len(saves) > before:
                unsaved = 0.0
            assert unsaved <= max(INTERVAL_SECONDS, PAUSE_PER_SAVE * saves[-1]) + 1e-6
    assert sum(saves) - saves[-1] <= trained / PAUSE_PER_SAVE + 1e-6


def test_neither_saving_nor_loading_takes_the_memory_of_a_second_copy(tmp_path: Path) -> None:
    count = 1_000_000
    state = replace(kept_state(), vectors=tuple(np.ones((3, count), np.float32)))
    fresh = replace(fresh_state(), vectors=tuple(np.ones((3, count), np.float32)))
    tracemalloc.start()
    try:
        save(tmp_path, state)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 4 * count / 10
        tracemalloc.reset_peak()
        loaded = Checkpoint(tmp_path, RUN, ROUND).load(fresh)
        _, peak = tracemalloc.get_traced_memory()
        assert loaded is not fresh
        assert peak < 3 * 4 * count + 4 * count / 10
    finally:
        tracemalloc.stop()
