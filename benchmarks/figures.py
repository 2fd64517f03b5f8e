"""What is measured: cases in, figures out, and the targets that they are held against."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

MEGABYTE = 1_000_000
SMALL_ROUND_SECONDS = 0.1  # at N <= 100 k
LARGEST_RATIO = 3.0  # to bare gRPC, at N >= 1 M
COORDINATOR_MB = 120  # at N <= 1 M
AGENT_MB = 100


@dataclass(frozen=True)
class Case:
    """One row: N parameters, K agents, a protection, measured rounds after one to warm up."""

    parameters: int
    agents: int
    protection: str
    rounds: int


@dataclass(frozen=True)
class Usage:
    """What one process used."""

    peak_bytes: int  # VmHWM: anonymous, file-mapped and shared pages together
    cpu_seconds: float  # user and system, all threads


@dataclass(frozen=True)
class Rounds:
    """The product's rounds; every list has one value per measured round."""

    seconds: list[float]  # from the end of one round to the end of the next
    phases: dict[str, list[float]]  # seconds by phase of the coordinator's state machine
    bytes_up: int  # payload per agent and round
    bytes_down: int
    coordinator: Usage  # CPU seconds per round
    agent: Usage  # the largest of the agents


@dataclass(frozen=True)
class Target:
    """A figure beside its limit."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure is within its limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Figures:
    """A case with what was measured of it."""

    case: Case
    product: Rounds
    bare_tls: list[float]  # seconds per round of gRPC alone, under the product's mutual TLS
    bare_insecure: list[float]  # the same without TLS

    @property
    def seconds(self) -> float:
        """Median round."""
        return statistics.median(self.product.seconds)

    @property
    def ratio_tls(self) -> float:
        """Median round over that of bare gRPC with TLS."""
        return self.seconds / statistics.median(self.bare_tls)

    @property
    def ratio_insecure(self) -> float:
        """Median round over that of bare gRPC without TLS."""
        return self.seconds / statistics.median(self.bare_insecure)

    def targets(self) -> Iterator[Target]:
        """Yield the targets that apply to this case; those of time are for `plain`."""
        small, plain = self.case.parameters <= MEGABYTE, self.case.protection == "plain"
        if plain and self.case.parameters <= 100_000:
            yield Target("seconds", self.seconds, SMALL_ROUND_SECONDS)
        if plain and self.case.parameters >= 1_000_000:
            yield Target("x bare, TLS", self.ratio_tls, LARGEST_RATIO)
            yield Target("x bare, no TLS", self.ratio_insecure, LARGEST_RATIO)
        if small:
            peak = self.product.coordinator.peak_bytes
            yield Target("coordinator MB", peak / MEGABYTE, COORDINATOR_MB)
            yield Target("agent MB", self.product.agent.peak_bytes / MEGABYTE, AGENT_MB)

    def to_json(self) -> dict[str, Any]:
        """Return everything as numbers."""
        return {
            **asdict(self),
            "median": {
                "seconds": self.seconds,
                "bare_tls": statistics.median(self.bare_tls),
                "bare_insecure": statistics.median(self.bare_insecure),
                "phases": {
                    name: statistics.median(values) for name, values in self.product.phases.items()
                },
            },
            "targets": [{**asdict(target), "met": target.met} for target in self.targets()],
        }
