"""Garbage is collected by the clock: all of it, also what an earlier look took for alive."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from coordinator import memory


@pytest.fixture(autouse=True)
def own_collector() -> Iterator[None]:
    """Leave the other tests the collector as it was."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)
    gc.enable()


class _Knot:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


async def test_what_ends_in_a_cycle_is_collected_however_long_it_lived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "TIDY_SECONDS", 0.0)
    gc.disable()  # what is collected is collected by the clock
    long_lived = _Knot()
    died_early, dies_late = weakref.ref(_Knot()), weakref.ref(long_lived)
    tidying = asyncio.create_task(memory.keep_tidy())
    await _until(lambda: died_early() is None)
    assert gc.get_freeze_count() > 0
    del long_lived
    await _until(lambda: dies_late() is None)
    tidying.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tidying


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("expected the object to be collected")
