"""Channels to the coordinator, and what a failed call means."""

import random
import time

import grpc

from fedloom.channels import CLIENT_OPTIONS
from fedloom.errors import FedloomError, Refused, refused_from_rpc

CLOSED_TIMES = 3  # in a row, before the cause is named: a restart closes connections too

_FOREIGN_SERVER = (
    "the server's certificate is not of the authority that this device pinned: "
    "join again with a new token if the coordinator was set up anew"
)
# What gRPC says of a failed TLS handshake, what it means, and whether trying again cannot help.
_TLS_PROBLEMS = (
    ("certificate has expired", "the server's certificate has ended, or our clock is fast", False),
    ("certificate is not yet valid", "the server's certificate is of tomorrow: our clock?", False),
    ("CERTIFICATE_VERIFY_FAILED", _FOREIGN_SERVER, True),
    ("certificate signature failure", _FOREIGN_SERVER, True),  # an authority of the same name
    ("WRONG_VERSION_NUMBER", "the port does not speak TLS: check the address", True),
    ("Hostname Verification", "the server's certificate is for another host name", True),
)
# TLS 1.3 lets a client speak before its certificate is looked at, and gRPC's server ends the
# connection without saying why: this is all that a device learns of a certificate refused by TLS.
_CLOSED_AT_ONCE = ("failed to connect to all addresses", "Socket closed")
_NOT_KNOWN = (
    "the coordinator closes every connection at once: it may not know the authority that this "
    "device joined under, or no coordinator is behind the address; join again with a new token if "
    "it was set up anew"
)


class Unreachable(FedloomError):
    """No answer from the coordinator; `hopeless` when trying again cannot help."""

    def __init__(self, address: str, problem: str, hopeless: bool) -> None:
        super().__init__(f"{address}: {problem}")
        self.hopeless = hopeless


class Backoff:
    """Waits longer from attempt to attempt while they fail at once; one that lasted starts anew."""

    def __init__(self, first_seconds: float, last_seconds: float) -> None:
        self._first, self._last = first_seconds, last_seconds
        self._shortest, self._longest = first_seconds, last_seconds
        self._next = first_seconds
        self._started = time.monotonic()

    def spread(self, first_seconds: float, last_seconds: float) -> None:
        """Let pauses be this long, as a large fleet needs, where they would be shorter."""
        if self._next == self._first:
            self._next = max(self._shortest, first_seconds)
        self._first = max(self._shortest, first_seconds)
        self._last = max(self._longest, first_seconds, last_seconds)

    def attempt(self) -> None:
        """Say that an attempt begins now."""
        self._started = time.monotonic()

    def pause(self, cause: FedloomError) -> float:
        """Return the seconds to wait after an attempt that ended with this cause."""
        if time.monotonic() - self._started > self._next:
            self._next = self._first
        # Full jitter: agents that were cut together come back evenly over the whole pause.
        wait = self._next * random.random()  # noqa: S311
        self._next = min(2 * self._next, self._last)
        if isinstance(cause, Refused) and cause.retry_after is not None:
            wait = max(wait, cause.retry_after * random.uniform(1.0, 1.5))  # noqa: S311
        return wait


def open_channel(address: str, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    """Return a channel that is kept alive; nothing is connected yet."""
    return grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS)


def understood(error: grpc.aio.AioRpcError, address: str) -> FedloomError:
    """Return what a failed call means: the coordinator's refusal, or that it is unreachable."""
    refused = refused_from_rpc(error)
    if refused is not None:
        return refused
    found = f"{error.details()} {error.debug_error_string()}"
    for sign, problem, hopeless in _TLS_PROBLEMS:
        if sign in found:
            return Unreachable(address, problem, hopeless)
    return Unreachable(address, f"{error.code().name}: {error.details()}", hopeless=False)


class Closings:
    """Counts connections that the coordinator closed as soon as TLS was done."""

    def __init__(self) -> None:
        self._times = 0

    def explained(self, error: grpc.aio.AioRpcError, address: str) -> FedloomError:
        """Return what a failed call means, in the light of those before it."""
        closed = all(sign in (error.details() or "") for sign in _CLOSED_AT_ONCE)
        self._times = self._times + 1 if closed else 0
        if self._times >= CLOSED_TIMES:
            return Unreachable(address, _NOT_KNOWN, hopeless=False)
        return understood(error, address)
