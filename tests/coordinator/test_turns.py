"""Turns at the event loop: a crowd comes in one by one, and everything else comes between."""

import asyncio
import contextlib
import itertools

from hypothesis import given
from hypothesis import strategies as st

from coordinator.services.turns import OneByOne


@given(st.integers(2, 40))
def test_of_a_crowd_that_is_ready_at_once_one_comes_in_a_pass_of_the_loop(crowd: int) -> None:
    assert all(between >= 1 for between in asyncio.run(_passes_between(crowd)))


async def _passes_between(crowd: int) -> list[int]:
    """Return how many passes of the loop lie between each two of the crowd."""
    line, passes, entered = OneByOne(), 0, list[int]()

    async def come_in() -> None:
        async with line:
            entered.append(passes)

    coming = [asyncio.create_task(come_in()) for _ in range(crowd)]
    while len(entered) < crowd:
        await asyncio.sleep(0)
        passes += 1
    await asyncio.gather(*coming)
    return [after - before for before, after in itertools.pairwise(entered)]


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_who_is_cut_off_in_the_line_holds_nobody_up(cut: list[bool]) -> None:
    async def crowd() -> int:
        line, entered = OneByOne(), 0

        async def come_in() -> None:
            nonlocal entered
            async with line:
                entered += 1

        coming = [asyncio.create_task(come_in()) for _ in cut]
        await asyncio.sleep(0)
        for task, is_cut in zip(coming, cut, strict=True):
            if is_cut:
                task.cancel()
        for task, is_cut in zip(coming, cut, strict=True):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 5.0)
            assert is_cut or not task.cancelled()
        await asyncio.wait_for(come_in(), 5.0)
        return entered

    assert asyncio.run(crowd()) >= cut.count(False) + 1
