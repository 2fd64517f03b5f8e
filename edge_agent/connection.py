"""Channels to the coordinator, and what a failed call means."""

import random
import time

import grpc

from fedloom.channels import CLIENT_OPTIONS
from fedloom.errors import FedloomError, Refused, refused_from_rpc

_FOREIGN_SERVER = (
    "the server's certificate is not of the authority that this device pinned: "
    "join again with a new token if the coordinator was set up anew"
)
_TLS_PROBLEMS = {
    "CERTIFICATE_VERIFY_FAILED": _FOREIGN_SERVER,
    "certificate signature failure": _FOREIGN_SERVER,  # an authority of the same name as ours
    "WRONG_VERSION_NUMBER": "the port does not speak TLS: check the address",
    "Hostname Verification": "the server's certificate is for another host name",
}


class Unreachable(FedloomError):
    """No answer from the coordinator; `hopeless` when trying again cannot help."""

    def __init__(self, address: str, problem: str, hopeless: bool) -> None:
        super().__init__(f"{address}: {problem}")
        self.hopeless = hopeless


class Backoff:
    """Waits longer from attempt to attempt while they fail at once; one that lasted starts anew."""

    def __init__(self, first_seconds: float, last_seconds: float) -> None:
        self._first, self._last = first_seconds, last_seconds
        self._next = first_seconds
        self._started = time.monotonic()

    def attempt(self) -> None:
        """Say that an attempt begins now."""
        self._started = time.monotonic()

    def pause(self, cause: FedloomError) -> float:
        """Return the seconds to wait after an attempt that ended with this cause."""
        if time.monotonic() - self._started > self._next:
            self._next = self._first
        # Jitter, so that agents that were cut together do not come back together.
        wait = self._next * random.uniform(0.5, 1.0)  # noqa: S311
        self._next = min(2 * self._next, self._last)
        if isinstance(cause, Refused) and cause.retry_after > 0:
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
    for sign, problem in _TLS_PROBLEMS.items():
        if sign in found:
            return Unreachable(address, problem, hopeless=True)
    return Unreachable(address, f"{error.code().name}: {error.details()}", hopeless=False)
