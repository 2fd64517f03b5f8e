"""Child processes that always end, and what they used."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from benchmarks.figures import Usage

END_SECONDS = 5.0
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A process did not do its part; the text ends with what it said last."""


class Children:
    """Processes that end with the `with` block: the last one started ends first."""

    def __init__(self) -> None:
        self._started: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self, command: Sequence[str], log: Path) -> int:
        """Start a process whose output goes to `log`; return its id.

        A session of its own: Ctrl-C on the terminal reaches this process alone, which ends the
        others in order.
        """
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append((process, log))
        return process.pid

    def check(self) -> None:
        """Raise Failed when a process ended that should not have."""
        for process, log in self._started:
            if process.poll() is not None:
                raise Failed(f"ended with {process.returncode}: {_last_lines(log)}")

    def wait(self, seconds: float) -> None:
        """Wait until all have ended well; raises Failed."""
        end = time.monotonic() + seconds
        for process, log in self._started:
            try:
                status = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Failed(f"not done after {seconds:.0f} s: {_last_lines(log)}") from None
            if status:
                raise Failed(f"ended with {status}: {_last_lines(log)}")

    def end(self) -> None:
        """Ask every process to end, and kill those that do not."""
        while self._started:
            process, _ = self._started[-1]
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._started.pop()


def run(command: Sequence[str]) -> str:
    """Run a command to its end and return what it printed; raises Failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout.strip()


def usage(pid: int) -> Usage:
    """Return what a living process used so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return Usage(int(peak) * 1024, ticks / _TICKS_PER_SECOND)


def free_port() -> int:
    """Return a port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exit_on_termination() -> None:
    """Make SIGTERM unwind like Ctrl-C, so that children end and folders go."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def _last_lines(log: Path) -> str:
    return log.read_text(errors="replace")[-800:]
