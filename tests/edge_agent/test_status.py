"""The status file: what the agent reports is what a person reads, and a dead process is told."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edge_agent.status import STATUS_FILE, Link, StatusFile, Step, read_status, told, wait_cause
from fedloom.v1 import control_pb2

RUN = bytes(range(16))


class Clock:
    """Moves a minute with each look."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 20, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


@pytest.mark.parametrize("step", Step)
def test_every_step_is_told_with_its_run_and_its_cause(tmp_path: Path, step: Step) -> None:
    file = StatusFile(tmp_path, Clock())
    file.link(Link.CONNECTED)
    file.step(step, RUN, 7, "the cause")
    lines = told(read_status(tmp_path))
    assert lines["now"].startswith(step)
    assert lines["now"].endswith(": the cause")
    assert "round 7 of run 00010203" in lines["now"]
    assert lines["link"].startswith("connected since 2026-11-20T00:")


def test_progress_is_that_of_the_training_alone(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, Clock())
    file.step(Step.TRAINING, RUN, 1)
    for share in (0.0, 0.4, 0.401):
        file.progress(share)
    assert "training, 40% done" in told(read_status(tmp_path))["now"]
    file.step(Step.UPLOADING, RUN, 1)
    file.progress(0.9)
    status = read_status(tmp_path)
    assert status is not None
    assert status.progress == 0


def test_since_when_moves_only_with_what_changed(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, Clock())
    file.step(Step.TRAINING, RUN, 1)
    before = read_status(tmp_path)
    file.step(Step.TRAINING, RUN, 1)
    file.progress(0.5)
    file.link(Link.RECONNECTING, "no route")
    after = read_status(tmp_path)
    assert before is not None
    assert after is not None
    assert after.step_since == before.step_since
    assert after.link_since > before.link_since


def test_what_was_declined_is_told_until_something_else_happens(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    file.step(Step.DECLINED, RUN, 3, "PROTECTION_TOO_WEAK: expected more")
    file.step(Step.WAITING, RUN, 3, "others were chosen")
    assert "PROTECTION_TOO_WEAK" in told(read_status(tmp_path))["now"]
    file.step(Step.WAITING, RUN, 4, "others were chosen")
    assert "PROTECTION_TOO_WEAK" not in told(read_status(tmp_path))["now"]


def test_a_process_that_is_gone_is_not_running(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from edge_agent.status import StatusFile;"
        "StatusFile(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    status = read_status(tmp_path)
    assert status is not None
    assert not status.is_current
    assert told(status)["now"] == f"not running; process {status.pid} is gone"
    assert "waiting" in told(status)["last"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_another_process_of_the_same_number_is_not_taken_for_the_agent(tmp_path: Path) -> None:
    StatusFile(tmp_path)
    kept = json.loads((tmp_path / STATUS_FILE).read_text())
    assert kept["pid"] == os.getpid()
    (tmp_path / STATUS_FILE).write_text(json.dumps(kept | {"process_started": "1"}))
    status = read_status(tmp_path)
    assert status is not None
    assert not status.is_current


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"pid": 1, "unknown": 2}', "\0"])
def test_a_file_of_another_version_is_as_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / STATUS_FILE).write_text(content)
    assert told(read_status(tmp_path)) == {"now": "has not run yet"}


def test_a_disk_that_does_not_take_the_file_stops_nothing(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    (tmp_path / STATUS_FILE).unlink()
    tmp_path.rmdir()
    file.step(Step.TRAINING, RUN, 1)
    assert read_status(tmp_path) is None


def test_every_cause_to_wait_has_words_of_its_own() -> None:
    words = {cause: wait_cause(cause) for cause in control_pb2.WaitCause.values()}
    assert words.pop(control_pb2.WAIT_CAUSE_UNSPECIFIED) == words[control_pb2.WAIT_CAUSE_NO_RUN]
    assert len(set(words.values())) == len(words)
    assert wait_cause(99) == words[control_pb2.WAIT_CAUSE_NO_RUN]
