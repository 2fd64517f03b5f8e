"""Working ahead changes neither the order nor the end, and leaves no thread."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.prefetching import prefetched


class Broken(Exception):
    """What the source raises."""


def source(items: list[int], then: type[Exception] | None, reached: list[int]) -> Iterator[int]:
    for item in items:
        reached.append(item)
        yield item
    if then is not None:
        raise then


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@given(st.lists(st.integers(), max_size=12), st.booleans())
def test_it_gives_what_its_source_gives(items: list[int], breaks: bool) -> None:
    found = []
    with pytest.raises(Broken) if breaks else nullcontext():
        for item in prefetched(source(items, Broken if breaks else None, [])):
            found.append(item)  # noqa: PERF402 - what came before the error counts
    assert found == items
    assert threads() == 0


@given(st.integers(0, 6))
def test_a_reader_that_stops_stops_the_source(taken: int) -> None:
    reached: list[int] = []
    reading = prefetched(source(list(range(100)), None, reached))
    assert [next(reading) for _ in range(taken)] == list(range(taken))
    reading.close()
    assert threads() == 0
    assert len(reached) <= taken + 4  # two wait, one is on its way, one in hand
