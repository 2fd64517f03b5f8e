"""What an agent says of itself in its hello, as values within limits."""

import re

from coordinator.selection import Traits
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

MAX_MEMORY_BYTES = 1 << 50
MAX_FIGURE = 1e9  # samples per second, seconds
MAX_PROCESSORS = 65_535
MAX_ENGINES = 8
MAX_AVAILABLE_SECONDS = 31 * 86_400
_ENGINE = re.compile(r"[a-z0-9_-]{1,32}")


def traits_of(hello: control_pb2.Hello, now: float) -> Traits:
    """Return what the agent tells; `now` is on the runs' clock. Raises Refused(MALFORMED)."""
    said = hello.capability
    _require(said.memory_bytes < MAX_MEMORY_BYTES, f"memory below {MAX_MEMORY_BYTES} bytes")
    for figure in (said.samples_per_second, said.training_seconds):
        _require(0 <= figure <= MAX_FIGURE, f"figures of training in 0..{MAX_FIGURE:g}")  # nor NaN
    _require(said.processors <= MAX_PROCESSORS, f"at most {MAX_PROCESSORS} processors")
    _require(len(said.engines) <= MAX_ENGINES, f"at most {MAX_ENGINES} engines")
    _require(all(map(_ENGINE.fullmatch, said.engines)), "short names of engines")
    until = 0.0
    if hello.HasField("availability"):
        left = hello.availability.seconds_left
        _require(1 <= left <= MAX_AVAILABLE_SECONDS, f"1..{MAX_AVAILABLE_SECONDS} seconds left")
        until = now + left
    return Traits(
        said.memory_bytes,
        said.samples_per_second,
        said.training_seconds,
        said.processors,
        tuple(sorted(set(said.engines))),
        until,
    )


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {expected}")
