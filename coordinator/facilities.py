"""What all runs of a coordinator share."""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from coordinator.metrics import Metrics
from coordinator.published import Published
from coordinator.sessions import Sessions
from coordinator.steering import Steering
from coordinator.store import Store


@dataclass(frozen=True)
class Facilities:
    """Where runs keep things, whom they reach, and whom they believe."""

    store: Store
    sessions: Sessions
    published: Published
    spool: Path  # of updates on their way into sums, a folder for each run
    authority: x509.Certificate
    metrics: Metrics
    steering: Steering
    crypto_processes: int = 1
