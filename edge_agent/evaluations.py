"""A run's states, measured on this device's held-out data: each once, whoever asks."""

from threading import Lock

from edge_agent.undertaking import Undertaking
from fedloom.quality import Evaluation, local_quality, named


class Evaluations:
    """Remembers the last state's. Methods block, and may be called from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._last: tuple[int, Evaluation | None] | None = None  # (round applied last, its state's)

    def of_state(self, run: Undertaking) -> Evaluation | None:
        """Return the quality of the model that this device uses; None without held-out data."""
        with self._lock:
            last = run.state.last.round
            if self._last is None or self._last[0] != last:
                self._last = (last, run.engine.evaluate(run.own_model))
            return self._last[1]

    def forget(self) -> None:
        """The state is another one than its round says."""
        self._last = None


def told(evaluation: Evaluation, run: Undertaking) -> dict[str, float]:
    """Return what a log line says of it."""
    quality = local_quality(evaluation, run.plan.task)
    return {name: round(value, 4) for name, value in named(quality, run.plan.task).items()}
