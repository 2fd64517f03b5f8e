"""What this device is doing and why it waits, in a small file that `fedloom-agent status` reads.

The running agent replaces it whenever something changes. It is for people: nothing is decided from
it, and a disk that does not take it costs a line in the log.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import structlog

from fedloom.v1 import control_pb2

STATUS_FILE = "status.json"
_PROGRESS_STEP = 0.01  # of the training: a smaller move is not worth a write
_log = structlog.get_logger()
_WAIT_CAUSES: dict[int, str] = {
    control_pb2.WAIT_CAUSE_GATHERING: "the run waits for more agents, or for its key",
    control_pb2.WAIT_CAUSE_NOT_SELECTED: "others were chosen for the open round",
    control_pb2.WAIT_CAUSE_PAUSED: "the operator has paused the run",
    control_pb2.WAIT_CAUSE_ROUND_CLOSED: "the round was closed without this device's update",
}


def wait_cause(cause: int) -> str:
    """Return the coordinator's cause for a person; one that is not known counts as NO_RUN."""
    return _WAIT_CAUSES.get(cause, "no run is open that this device can take part in")


class Link(StrEnum):
    """How the device stands with the coordinator."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    AWAY = "away"
    ENDED = "ended"


class Step(StrEnum):
    """What the device is doing."""

    PREPARING = "preparing"
    TRAINING = "training"
    UPLOADING = "uploading"
    VOUCHING = "vouching"
    APPLYING = "applying"
    WAITING = "waiting"
    DECLINED = "declined"


@dataclass(frozen=True)
class Status:
    """One moment; times are ISO 8601 in UTC."""

    pid: int
    process_started: str  # tells the process from a later one of the same number; "" if unknown
    link: str = Link.CONNECTING
    link_cause: str = ""
    link_since: str = ""
    step: str = Step.WAITING
    step_cause: str = ""
    step_since: str = ""
    run: str = ""  # hexadecimal; "" for none
    round: int = 0
    progress: float = 0.0  # of the training, 0..1

    @property
    def is_current(self) -> bool:
        """Whether the process that wrote it still runs."""
        if os.name != "posix":
            return True  # os.kill asks there for something else
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's, and alive
        return self.process_started == _process_started(self.pid)

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self) | {"is_current": self.is_current}


class StatusFile:
    """Keeps the file in step with what the agent reports."""

    def __init__(self, home: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)):
        self._path = home / STATUS_FILE
        self._clock = clock
        now = self._now()
        pid = os.getpid()
        self._status = Status(pid, _process_started(pid), link_since=now, step_since=now)
        self._write()

    def link(self, link: Link, cause: str = "") -> None:
        """Report how the device stands with the coordinator, and why."""
        before = self._status
        if (link, cause) != (before.link, before.link_cause):
            self._status = replace(before, link=link, link_cause=cause, link_since=self._now())
            self._write()

    def step(self, step: Step, run_id: bytes = b"", round_number: int = 0, cause: str = "") -> None:
        """Report what the device does now, and why.

        Waiting after a step that was declined goes on being that: it says more.
        """
        before = self._status
        here = (run_id.hex(), round_number)
        if step is Step.WAITING and before.step == Step.DECLINED and here == _place(before):
            return
        if (step, cause, here) != (before.step, before.step_cause, _place(before)):
            self._status = replace(
                before,
                step=step,
                step_cause=cause,
                step_since=self._now(),
                run=run_id.hex(),
                round=round_number,
                progress=0.0,
            )
            self._write()

    def progress(self, share: float) -> None:
        """Report how much of the training is done; anything else has no progress."""
        before = self._status
        if before.step == Step.TRAINING and abs(share - before.progress) >= _PROGRESS_STEP:
            self._status = replace(before, progress=share)
            self._write()

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds")

    def _write(self) -> None:
        partial = self._path.with_name(f"{STATUS_FILE}.part")
        try:
            partial.write_text(json.dumps(asdict(self._status)))
            partial.replace(self._path)
        except OSError as error:
            _log.warning("status not written", problem=error.strerror)


def read_status(home: Path) -> Status | None:
    """Return what the agent wrote last; None where it never ran, or was of another version."""
    try:
        return Status(**json.loads((home / STATUS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def told(status: Status | None) -> dict[str, str]:
    """Return the status as lines for a person: what, and its value."""
    if status is None:
        return {"now": "has not run yet"}
    doing = status.step if status.step != Step.TRAINING else f"training, {status.progress:.0%} done"
    if status.run:
        doing += f", round {status.round} of run {status.run[:8]}"
    doing += f", since {status.step_since}" + (
        f": {status.step_cause}" if status.step_cause else ""
    )
    link = f"{status.link} since {status.link_since}"
    link += f": {status.link_cause}" if status.link_cause else ""
    if not status.is_current:
        return {"now": f"not running; process {status.pid} is gone", "last": doing, "link": link}
    return {"now": doing, "link": link}


def _because(cause: str) -> str:
    return f": {cause}" if cause else ""


def _place(status: Status) -> tuple[str, int]:
    return status.run, status.round


def _process_started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; "" where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # the name before it may hold blanks
