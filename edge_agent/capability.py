"""What this device tells of itself when it connects, and what it remembers of its last training.

Figures are rounded to powers of two: many devices say the same, and a run can still choose.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from edge_agent.resources import available_memory
from fedloom.terms import LocalTraining
from fedloom.v1 import control_pb2

PACE_FILE = "pace.json"
_MAX_FIGURE = 1e9
_log = structlog.get_logger()


@dataclass(frozen=True)
class Pace:
    """How fast the last finished local training was; zeros: there was none."""

    samples_per_second: float = 0.0
    training_seconds: float = 0.0


def pace_of(terms: LocalTraining, samples: int, seconds: float) -> Pace:
    """Return the pace of a training over so many rows of data that took so long, above 0."""
    if terms.local_steps:
        rows = terms.local_steps * terms.batch_size
    else:
        rows = terms.epochs * samples
        rows = min(rows, terms.max_steps * terms.batch_size) if terms.max_steps else rows
    return Pace(min(rows / seconds, _MAX_FIGURE), min(seconds, _MAX_FIGURE))


def keep_pace(home: Path, pace: Pace) -> None:
    """Remember the pace; a disk that does not take it costs a line in the log."""
    path = home / PACE_FILE
    partial = path.with_name(f"{PACE_FILE}.part")
    try:
        partial.write_text(json.dumps(asdict(pace)))
        partial.replace(path)
    except OSError as error:
        _log.warning("pace not written", problem=error.strerror)


def kept_pace(home: Path) -> Pace:
    """Return what was remembered; zeros for nothing, and for what is not ours."""
    try:
        found = Pace(**json.loads((home / PACE_FILE).read_text()))
        figures = (found.samples_per_second, found.training_seconds)
        return found if all(0 <= figure <= _MAX_FIGURE for figure in figures) else Pace()
    except (OSError, ValueError, TypeError):
        return Pace()


def told_capability(home: Path, engine: str, budget_bytes: int) -> control_pb2.Capability:
    """Return what the coordinator is told; `budget_bytes` 0: as much memory as the system has."""
    pace, memory = kept_pace(home), budget_bytes or available_memory() or 0
    return control_pb2.Capability(
        memory_bytes=(1 << memory.bit_length()) >> 1,
        samples_per_second=_power_of_two(pace.samples_per_second, math.floor),
        training_seconds=_power_of_two(pace.training_seconds, math.ceil),
        processors=min(os.cpu_count() or 0, 65_535),
        engines=[engine],
    )


def _power_of_two(figure: float, rounded: Callable[[float], int]) -> float:
    return min(2.0 ** rounded(math.log2(figure)), _MAX_FIGURE) if figure > 0 else 0.0
