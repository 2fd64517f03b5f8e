"""How much one peer may ask for, and all of them together: the one place that says "too much".

| limit, key of `[limits]` in coordinator.toml | counts | above it |
|---|---|---|
| `connections`, `enrolment_connections` | TCP connections of a port, TLS or not | closed by gRPC |
| `connections_per_address` | connections from one address that carry a call | BUSY |
| `streams_per_agent` | control streams: one lives, older ones are ending | BUSY |
| 15/16 of `connections` | control streams of all: gRPC closes more without a word | BUSY |
| `connects_per_minute` | control streams and certificates that an agent asks for | BUSY |
| `messages_per_second` | messages of a control stream | read later: its window fills |
| `transfers_per_agent` | uploads and downloads that are open | BUSY |
| `mib_in_flight` | memory that open transfers may need, in all | BUSY |
| `joins_per_minute` | attempts to join that fail, from one address | BUSY |
| `joins_per_minute_in_all` | the same, from anywhere | BUSY |

A minute's worth may come at once. BUSY is said a second late: it holds the caller's place among
the few calls that its connection may have open, so that a flood of calls is as slow as its answers.
What gRPC counts for us by itself stands in `fedloom/channels.py`: calls per connection, sizes of
messages and headers, pings, handshakes that do not end, connections that do nothing.
"""

import asyncio
import contextlib
import ipaddress
import random
import resource
import time
import tomllib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar
from urllib.parse import unquote

import structlog

from fedloom.artifacts import PART_BYTES
from fedloom.channels import WINDOW_BYTES, ChannelOptions
from fedloom.errors import ConfigError, Reason, Refused

HOLD_SECONDS = 1.0  # before BUSY is said, on average
MAX_HELD = 4096  # calls that wait for that; more are refused at once
RETRY_SECONDS = 2.0  # what BUSY suggests where nothing better is known
LOG_SECONDS = 10.0  # a flood of calls is no flood of lines
MAX_BUCKETS = 16_384  # peers whose past is remembered; the one that was quiet longest is forgotten
BURST_SECONDS = 10.0  # of messages on a control stream that may come at once
SPARE_FILES = 512  # store, spool, artifacts, logs: what is open beside connections
_MIB = 1 << 20
_ROUNDING = 1e-9  # who has waited as long as it was told is not told again
_log = structlog.get_logger()


@dataclass(frozen=True)
class Limits:
    """`[limits]` of coordinator.toml."""

    connections: int = 4096  # about 120 KB each, most of it gRPC's and TLS's
    enrolment_connections: int = 1024
    # All devices behind one NAT, or one proxy: 1,000, which a reboot of it leaves half-open while
    # they come back.
    connections_per_address: int = 2048
    streams_per_agent: int = 4
    connects_per_minute: int = 30
    messages_per_second: int = 100  # a round needs from two, plain, to five, sealed
    transfers_per_agent: int = 4  # this project's agent needs one
    mib_in_flight: int = 2048  # 1.5 for each transfer of more than that
    joins_per_minute: int = 60
    joins_per_minute_in_all: int = 1200

    @property
    def streams(self) -> int:
        """Control streams that may be open at once, below what gRPC closes without a word."""
        return max(1, self.connections - self.connections // 16)


def load_limits(path: Path) -> Limits:
    """Read `[limits]` of a coordinator.toml; raises ConfigError on unknown keys and bad values."""
    table: Any = tomllib.loads(path.read_text()).get("limits", {})
    if not isinstance(table, dict):
        raise ConfigError(str(path), f"limits: expected a table, found {table!r}")
    known = {field.name for field in fields(Limits)}
    for key, value in table.items():
        if key not in known:
            expected = ", ".join(sorted(known))
            raise ConfigError(str(path), f"limits.{key}: unknown key; known are {expected}")
        if type(value) is not int or not 1 <= value <= 1 << 30:
            raise ConfigError(
                str(path), f"limits.{key}: expected a number from 1 up, found {value!r}"
            )
    return Limits(**table)


def connection_options(connections: int) -> ChannelOptions:
    """Return what has gRPC's server close the connections above so many, for each of its ports."""
    return [("grpc.max_allowed_incoming_connections", connections)]


def allow_files(limits: Limits) -> None:
    """Let this process open as many files as its connections may need; say so if it may not."""
    needed = limits.connections + limits.enrolment_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    allowed = needed if hard == unlimited else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        # Connections that use them up would keep the store and the spool from opening theirs.
        _log.warning("too few files for [limits] connections", allowed=allowed, needed=needed)


class TokenBucket:
    """Lets `per_second` through in the long run, and `burst` at once after a pause."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = self._level = burst
        self._filled_at = 0.0

    def take(self, now: float) -> float:
        """Take a token and return 0, or take none and return the seconds until there is one."""
        passed = max(0.0, now - self._filled_at)
        self._level = min(self._burst, self._level + passed * self._per_second)
        self._filled_at = now
        if self._level < 1 - _ROUNDING:
            return (1 - self._level) / self._per_second
        self._level -= 1
        return 0.0

    def give_back(self) -> None:
        """Return the token that was taken."""
        self._level = min(self._burst, self._level + 1)


_Key = TypeVar("_Key", bound=Hashable)


class Buckets(Generic[_Key]):
    """A bucket for each peer, for as many peers as memory is meant for."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._by_key: OrderedDict[_Key, TokenBucket] = OrderedDict()

    def of(self, key: _Key) -> TokenBucket:
        """Return the peer's bucket, a full one for a peer that is not remembered."""
        found = self._by_key.setdefault(key, TokenBucket(self._per_minute / 60, self._per_minute))
        self._by_key.move_to_end(key)
        if len(self._by_key) > MAX_BUCKETS:
            self._by_key.popitem(last=False)
        return found


def address_of(peer: str) -> str:
    """Return the address in gRPC's name of a peer; of IPv6 the /64 that one subscriber has."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    host = unquote(rest.rpartition(":")[0]).strip("[]").partition("%")[0]
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)


class Pace:
    """How fast a control stream is read: what comes faster waits in the sender's window."""

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._bucket = TokenBucket(per_second, per_second * BURST_SECONDS)
        self._clock = clock

    async def next(self) -> None:
        """Wait until the next message may be looked at."""
        if wait := self._bucket.take(self._clock()):
            await asyncio.sleep(wait)
            self._bucket.take(self._clock())


class Admission:
    """What is open now, and who came how often."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.clock = clock
        # When an agent may try again that finds no free stream; the fleet's pacing knows better.
        self.retry_seconds: Callable[[str], float] = lambda agent: RETRY_SECONDS
        self.calls: Counter[str] = Counter()  # connection (gRPC's name of the peer) -> open calls
        self.connections: Counter[str] = Counter()  # address -> connections that carry a call
        self.streams: Counter[str] = Counter()  # agent -> open control streams
        self.transfers: Counter[str] = Counter()  # agent -> open transfers
        self.bytes_in_flight = 0
        self.connects: Buckets[str] = Buckets(limits.connects_per_minute)
        self.joins: Buckets[str] = Buckets(limits.joins_per_minute)
        in_all = limits.joins_per_minute_in_all
        self.all_joins = TokenBucket(in_all / 60, in_all)
        self._held = 0
        self._refused: Counter[str] = Counter()
        self._logged_at: dict[str, float] = {}

    @asynccontextmanager
    async def call(self, peer: str) -> AsyncIterator["Call"]:
        """Admit a call of this peer for as long as the block runs; raises Refused(BUSY)."""
        with contextlib.ExitStack() as releases:
            found = Call(self, peer, releases)
            await found.connection()
            yield found

    async def refuse(self, limit: str, wait: float = RETRY_SECONDS) -> NoReturn:
        """Say BUSY, late; `wait` in seconds is what the peer is told."""
        self._log(limit)
        if self._held < MAX_HELD:
            self._held += 1
            try:
                # Spread, or those that came together would keep the loop busy together.
                await asyncio.sleep(HOLD_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
            finally:
                self._held -= 1
        raise Refused(Reason.BUSY, f"expected no more than [limits] {limit}", max(1.0, wait))

    def _log(self, limit: str) -> None:
        self._refused[limit] += 1
        now = self.clock()
        if now - self._logged_at.get(limit, -LOG_SECONDS) >= LOG_SECONDS:
            self._logged_at[limit] = now
            _log.warning("too much", limit=limit, refused=self._refused.pop(limit))


class Call:
    """One call: what it holds is given back when it ends."""

    def __init__(self, admission: Admission, peer: str, releases: contextlib.ExitStack) -> None:
        self._admission = admission
        self._limits = admission.limits
        self._peer = peer
        self._address = address_of(peer)
        self._releases = releases

    async def connection(self) -> None:
        """Count the connection that the call came on."""
        calls, connections = self._admission.calls, self._admission.connections
        if not calls[self._peer]:
            if connections[self._address] >= self._limits.connections_per_address:
                await self._admission.refuse("connections_per_address")
            connections[self._address] += 1
        calls[self._peer] += 1
        self._releases.callback(self._leave)

    async def stream(self, agent: str) -> Pace:
        """Admit a control stream and return how fast it is read."""
        admission = self._admission
        if admission.streams[agent] >= self._limits.streams_per_agent:
            await admission.refuse("streams_per_agent")
        if admission.streams.total() >= self._limits.streams:
            await admission.refuse("connections", admission.retry_seconds(agent))
        await self._connect(agent)
        self._count(admission.streams, agent)
        return Pace(self._limits.messages_per_second, admission.clock)

    async def renewal(self, agent: str) -> None:
        """Admit a request for a newer certificate: a connection with it is to follow."""
        await self._connect(agent)

    async def _connect(self, agent: str) -> None:
        if wait := self._admission.connects.of(agent).take(self._admission.clock()):
            await self._admission.refuse("connects_per_minute", wait)

    async def transfer(self, agent: str) -> None:
        """Admit an upload or a download."""
        if self._admission.transfers[agent] >= self._limits.transfers_per_agent:
            await self._admission.refuse("transfers_per_agent")
        self._count(self._admission.transfers, agent)

    async def memory(self, left_bytes: int) -> None:
        """Admit a transfer's bytes: of those left, a part and a window may have to be held."""
        held = min(left_bytes, PART_BYTES + WINDOW_BYTES)
        if self._admission.bytes_in_flight + held > self._limits.mib_in_flight * _MIB:
            await self._admission.refuse("mib_in_flight")
        self._admission.bytes_in_flight += held
        self._releases.callback(self._free, held)

    async def join(self) -> Callable[[], None]:
        """Admit an attempt to join; what is returned is called when it succeeds: it costs nothing.

        So a fleet behind one address joins at any speed, and one that guesses does not.
        """
        admission = self._admission
        address = admission.joins.of(self._address)
        if wait := address.take(admission.clock()):
            await admission.refuse("joins_per_minute", wait)
        if wait := admission.all_joins.take(admission.clock()):
            address.give_back()
            await admission.refuse("joins_per_minute_in_all", wait)

        def succeeded() -> None:
            address.give_back()
            admission.all_joins.give_back()

        return succeeded

    def _count(self, counter: Counter[str], agent: str) -> None:
        counter[agent] += 1
        self._releases.callback(_uncount, counter, agent)

    def _leave(self) -> None:
        _uncount(self._admission.calls, self._peer)
        if not self._admission.calls[self._peer]:
            _uncount(self._admission.connections, self._address)

    def _free(self, held: int) -> None:
        self._admission.bytes_in_flight -= held


def _uncount(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
