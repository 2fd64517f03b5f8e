"""What the limits promise, without a network: buckets, counters, addresses, the file."""

import asyncio
import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.services import limits as module
from coordinator.services.limits import (
    Admission,
    Buckets,
    Limits,
    TokenBucket,
    address_of,
    load_limits,
)
from fedloom.errors import ConfigError, Reason, Refused

_pauses = st.lists(st.floats(0, 30), min_size=1, max_size=100)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOLD_SECONDS", 0.0)


@given(_pauses, st.floats(0.1, 50), st.integers(1, 20))
def test_a_bucket_lets_through_its_rate_and_one_burst(
    pauses: list[float], per_second: float, burst: int
) -> None:
    bucket = TokenBucket(per_second, burst)
    moments = list(itertools.accumulate(pauses))
    taken = [now for now in moments if bucket.take(now) == 0]
    for i, start in enumerate(taken):
        for count, end in enumerate(taken[i:], 1):
            assert count <= burst + per_second * (end - start) + 1e-6


@given(_pauses, st.floats(0.1, 50), st.integers(1, 20))
def test_whoever_waits_as_long_as_a_bucket_says_gets_a_token(
    pauses: list[float], per_second: float, burst: int
) -> None:
    bucket = TokenBucket(per_second, burst)
    now = 0.0
    for pause in pauses:
        now += pause
        if wait := bucket.take(now):
            now += wait + 1e-6
            assert bucket.take(now) == 0


def test_a_bucket_given_back_to_is_as_it_was() -> None:
    bucket = TokenBucket(1, 1)
    for _ in range(10):
        assert bucket.take(0.0) == 0
        bucket.give_back()
    assert bucket.take(0.0) == 0
    assert bucket.take(0.0) == pytest.approx(1)


def test_only_so_many_peers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUCKETS", 3)
    buckets: Buckets[int] = Buckets(per_minute=1)
    assert buckets.of(0).take(0.0) == 0
    for key in (1, 2, 0, 3):  # 1 was quiet longest
        kept = buckets.of(key)
    assert buckets.of(3) is kept
    assert buckets.of(0).take(0.0) > 0
    assert len(buckets._by_key) == 3


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:4711", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "fe80::/64"),
        ("unix:/run/coordinator", "unix:/run/coordinator"),
    ],
)
def test_a_peer_is_known_by_what_one_subscriber_has(peer: str, address: str) -> None:
    assert address_of(peer) == address


async def busy(limit: str, call: object) -> None:
    """Expect that awaiting this is refused for that limit."""
    with pytest.raises(Refused) as caught:
        await call  # type: ignore[misc]
    assert caught.value.reason is Reason.BUSY
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1
    assert f"[limits] {limit}" in caught.value.subject


async def test_what_a_call_holds_is_given_back_when_it_ends() -> None:
    small = Limits(
        connections_per_address=2, streams_per_agent=1, transfers_per_agent=1, mib_in_flight=2
    )
    admission = Admission(small, clock=lambda: 0.0)
    for _ in range(3):
        async with (
            admission.call("ipv4:192.0.2.7:1") as first,
            admission.call("ipv4:192.0.2.7:2") as second,
            admission.call("ipv4:192.0.2.8:1"),
            admission.call("ipv4:192.0.2.7:2"),  # no third connection: a second call
        ):
            await busy("connections_per_address", enter(admission, "ipv4:192.0.2.7:3"))
            await first.stream("a")
            await second.stream("b")
            await busy("streams_per_agent", second.stream("a"))
            await first.transfer("a")
            await busy("transfers_per_agent", second.transfer("a"))
            await first.memory(1 << 40)
            await busy("mib_in_flight", second.memory(1 << 40))
            await second.memory(1 << 10)  # a small one still fits
        assert not admission.calls
        assert not admission.connections
        assert not admission.streams
        assert not admission.transfers
        assert admission.bytes_in_flight == 0


async def enter(admission: Admission, peer: str) -> None:
    """Begin a call and end it."""
    async with admission.call(peer):
        pass


async def test_a_call_that_fails_gives_back_too() -> None:
    admission = Admission(Limits())

    async def fail() -> None:
        async with admission.call("ipv4:192.0.2.7:1") as call:
            await call.stream("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not admission.streams
    assert not admission.connections


async def test_joins_that_succeed_cost_nothing_and_others_do() -> None:
    now = 0.0
    admission = Admission(Limits(joins_per_minute=3), clock=lambda: now)
    for _ in range(20):
        async with admission.call("ipv4:192.0.2.7:1") as call:
            (await call.join())()
    for _ in range(3):
        async with admission.call("ipv4:192.0.2.7:1") as call:
            await call.join()
    async with admission.call("ipv4:192.0.2.7:1") as call:
        await busy("joins_per_minute", call.join())
    async with admission.call("ipv4:192.0.2.8:1") as call:
        await call.join()
    now = 20.0
    async with admission.call("ipv4:192.0.2.7:1") as call:
        await call.join()
        await busy("joins_per_minute", call.join())


async def test_joins_from_everywhere_are_bounded_together() -> None:
    admission = Admission(Limits(joins_per_minute_in_all=10), clock=lambda: 0.0)
    for last in range(10):
        async with admission.call(f"ipv4:192.0.2.{last}:1") as call:
            await call.join()
    async with admission.call("ipv4:192.0.2.200:1") as call:
        await busy("joins_per_minute_in_all", call.join())


async def test_an_agent_opens_streams_no_faster_than_permitted() -> None:
    admission = Admission(Limits(connects_per_minute=2, streams_per_agent=9), clock=lambda: 0.0)
    async with admission.call("ipv4:192.0.2.7:1") as call:
        await call.stream("a")
        await call.stream("a")
        await busy("connects_per_minute", call.stream("a"))
        await call.stream("b")


async def test_renewals_are_as_frequent_as_the_connections_that_follow_them() -> None:
    admission = Admission(Limits(connects_per_minute=2), clock=lambda: 0.0)
    async with admission.call("ipv4:192.0.2.7:1") as call:
        await call.stream("a")
        await call.renewal("a")
        await busy("connects_per_minute", call.renewal("a"))
        await busy("connects_per_minute", call.stream("a"))


async def test_the_defaults_let_in_a_thousand_agents_of_one_address_and_back_in() -> None:
    admission = Admission(Limits(), clock=lambda: 0.0)
    async with contextlib.AsyncExitStack() as open_calls:
        for port in range(2000):  # the first half is half-open, and nobody has noticed
            call = await open_calls.enter_async_context(admission.call(f"ipv4:192.0.2.7:{port}"))
            await call.stream(f"agent-{port % 1000}")
            if port >= 1000:
                await call.transfer(f"agent-{port % 1000}")
                await call.memory(1 << 40)
    assert admission.limits.connections >= 2000


async def test_messages_above_the_rate_wait_and_none_is_lost() -> None:
    slept: list[float] = []
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        slept.append(seconds)

    pace = module.Pace(20, lambda: now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        for _ in range(200):
            await pace.next()
        assert not slept
        for _ in range(100):
            await pace.next()
    assert now == pytest.approx(5)


def test_the_file_names_limits_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('address = "x"\n')
    assert load_limits(path) == Limits()
    path.write_text("[limits]\nconnections = 7\nmib_in_flight = 9\n")
    assert load_limits(path) == Limits(connections=7, mib_in_flight=9)
    path.write_text("limits = 5\n")
    with pytest.raises(ConfigError, match="limits: expected a table"):
        load_limits(path)
    for wrong in ("connection = 7", "connections = 0", "connections = true", 'connections = "7"'):
        path.write_text(f"[limits]\n{wrong}\n")
        with pytest.raises(ConfigError, match=r"limits\.connection"):
            load_limits(path)
