"""What systemd is told, and what a shutdown waits for."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from coordinator.supervision import Supervisor, Unfinished


@pytest.mark.parametrize("abstract", [False, True])
def test_the_supervisor_is_told_at_its_socket(tmp_path: Path, abstract: bool) -> None:
    name = f"@fedloom-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        listener.setblocking(False)
        Supervisor({"NOTIFY_SOCKET": name}).tell("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_without_a_supervisor_nothing_is_said_and_nothing_fails(tmp_path: Path) -> None:
    Supervisor({}).tell("READY=1")
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell("READY=1")


async def test_without_a_watchdog_nobody_feeds_it() -> None:
    await Supervisor({}).watch()  # it ends


async def test_work_is_finished_though_its_caller_is_cut_off() -> None:
    unfinished, may_end, done = Unfinished(), asyncio.Event(), []

    async def work(number: int) -> int:
        await may_end.wait()
        done.append(number)
        return number

    callers = [asyncio.create_task(unfinished.finish(work(n))) for n in range(3)]
    await asyncio.sleep(0)
    callers[0].cancel()
    assert not await unfinished.settled(0.0)
    may_end.set()
    assert await unfinished.settled(60.0)
    assert sorted(done) == [0, 1, 2]
    assert callers[0].cancelled()
    assert [await caller for caller in callers[1:]] == [1, 2]


async def test_a_fault_of_the_work_is_its_callers() -> None:
    unfinished = Unfinished()

    async def broken() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await unfinished.finish(broken())
    assert await unfinished.settled(0.0)
