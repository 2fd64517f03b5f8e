"""What agents report of an open round, remembered for whoever watches the run."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from coordinator.events import Applied, Declined, Ready
from coordinator.progress import SATURATION_WARNING
from coordinator.run_state import Phase, RunState
from coordinator.store import RoundRecord, Store


class RoundReports:
    """Writes reports to the store; only of the state's round and of those invited to it."""

    def __init__(
        self,
        store: Store,
        run_id: bytes,
        update_length: Callable[[], int],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        """`update_length` gives U of the last round in the run's history."""
        self._store = store
        self._run_id = run_id
        self._update_length = update_length
        self._log = log
        self._traffic: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # sent, received

    def open_round(self) -> None:
        """Count bytes from here."""
        self._traffic.clear()

    def count_traffic(self, agent: str, sent: int, received: int) -> None:
        """Count payload bytes of the agent's artifacts."""
        counts = self._traffic[agent]
        counts[0] += sent
        counts[1] += received

    def progress(self, state: RunState, agent: str, round_number: int, share: float) -> None:
        """Remember how far local training is."""
        if state.phase is Phase.TRAINING:
            self._write(state, round_number, agent, progress=share)

    def ready(self, state: RunState, event: Ready) -> None:
        """Remember what training gave."""
        self._write(
            state,
            event.round,
            event.agent,
            progress=1.0,
            training_loss=event.training_loss,
            training_seconds=event.training_seconds,
        )

    def applied(self, state: RunState, event: Applied, last: RoundRecord | None) -> None:
        """Remember the digest of the agent's state, its quality, and how much was clipped.

        `last`: the round that the agent tells of, where it is the last one of the run's history.
        """
        values: dict[str, Any] = {
            "state_sha256": event.state_sha256,
            "saturated": event.saturated,
            "saturated_share": 0.0 if last is None else self._saturated_share(event, last),
        }
        if event.evaluation is not None:
            values |= {
                "evaluated": event.evaluation.count,
                "correct": event.evaluation.correct,
                "evaluation_loss": event.evaluation.mean_loss,
            }
        self._write(state, event.round, event.agent, **values)

    def _saturated_share(self, event: Applied, record: RoundRecord) -> float:
        """Return which part of the round's values lay beyond its clip."""
        share: float = event.saturated / (self._update_length() * len(record.slots))
        if share > SATURATION_WARNING:
            self._log.warning(
                "updates saturated: their values beyond the clip were cut",
                round=event.round,
                agent=event.agent,
                share=round(share, 5),
            )
        return share

    def declined(self, state: RunState, event: Declined) -> None:
        """Remember why; what an excluded agent declines next follows from that."""
        if event.agent not in state.excluded:
            self._write(state, event.round, event.agent, refusal=event.reason.value)

    def close_round(
        self,
        number: int,
        seconds: float,
        quality: Mapping[str, float],
        training_loss: float | None,
    ) -> None:
        """Remember how long the round took, what it moved, and the means that it opened to."""
        self._store.close_round(self._run_id, number, seconds, quality, training_loss)
        rows = [
            {"agent_id": agent, "sent_bytes": sent, "received_bytes": received}
            for agent, (sent, received) in self._traffic.items()
        ]
        self._store.report_all(self._run_id, number, rows)

    def _write(self, state: RunState, round_number: int, agent: str, **values: Any) -> None:
        if round_number == state.round and agent in state.invited:
            self._store.report(self._run_id, round_number, agent, **values)
