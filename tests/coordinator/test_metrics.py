"""Metrics: rounds and phases are told from states alone, and the store is watched from outside."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, invariant
from prometheus_client import generate_latest

from coordinator.events import AbandonRound, CloseRound, Effect, Event
from coordinator.metrics import CryptoStep, Metrics, RoundOutcome, RunMeter, Side
from coordinator.run_state import Phase, RunPolicy, RunState
from coordinator.store import Store
from fedloom.errors import Reason
from tests.coordinator.test_rounds_orderings import Orderings, policies


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Return one sample's value."""
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, (name, labels)
    return found


class Metered(Orderings):
    """A run in any order of events, with a meter that sees nothing but its states."""

    @initialize(policy=policies)
    def open(self, policy: RunPolicy) -> None:
        super().open(policy)
        self.metrics = Metrics()
        self.meter = RunMeter(self.metrics, self.now)
        self.closed = self.abandoned = 0
        self.moved_at = self.now

    def check_step(self, before: RunState, event: Event, effects: tuple[Effect, ...]) -> None:
        super().check_step(before, event, effects)
        self.meter.moved(before, self.state, self.now)
        self.closed += CloseRound() in effects
        self.abandoned += AbandonRound() in effects
        if (before.phase, before.round) != (self.state.phase, self.state.round):
            self.moved_at = self.now

    @invariant()
    def rounds_are_those_that_the_effects_end(self) -> None:
        if not hasattr(self, "metrics"):
            return
        ended = {
            outcome: value(self.metrics, "fedloom_rounds_total", outcome=outcome)
            for outcome in RoundOutcome
        }
        assert ended[RoundOutcome.FINISHED] == self.closed
        # A run that ends in the middle of a round abandons it without saying so.
        unsaid = ended[RoundOutcome.VOID] + ended[RoundOutcome.FAILED] - self.abandoned
        assert unsaid in (0, 1)
        assert not unsaid or self.state.phase is Phase.FAILED

    @invariant()
    def phases_fill_the_time(self) -> None:
        if hasattr(self, "metrics"):
            name = "fedloom_phase_seconds_sum"
            seconds = [value(self.metrics, name, phase=phase.value) for phase in Phase]
            assert sum(seconds) == pytest.approx(self.moved_at)


TestMetered = Metered.TestCase
TestMetered.settings = settings(max_examples=30, stateful_step_count=30)


def test_the_store_is_watched_without_its_knowledge(store: Store, run_id: bytes) -> None:
    metrics = Metrics()
    metrics.watch_store(store.engine)
    seconds = "fedloom_store_transaction_seconds_count"
    store.roster.add_invitation(bytes(32), "device", 10.0)
    store.report(run_id, 1, "device", progress=0.5)
    assert store.runs()
    assert value(metrics, "fedloom_store_writes_total", table="invitations") >= 1
    assert value(metrics, "fedloom_store_writes_total", table="reports") == 1
    assert value(metrics, "fedloom_store_writes_total", table="journal") == 0
    assert value(metrics, seconds, kind="write") == 2
    assert value(metrics, seconds, kind="read") == 1
    assert value(metrics, "fedloom_runs", phase="gathering") == 1
    assert value(metrics, "fedloom_runs", phase="failed") == 0
    assert value(metrics, "fedloom_agents_enrolled") == 0


def test_a_store_in_trouble_hides_no_series(store: Store) -> None:
    metrics = Metrics()
    metrics.watch_store(store.engine)
    with store.engine.begin() as db:
        db.exec_driver_sql("DROP TABLE agents")
    text = generate_latest(metrics.registry).decode()
    assert "fedloom_rounds_total" in text
    assert "fedloom_agents_enrolled" not in text


@pytest.mark.parametrize(("reason", "label"), [(5, "MALFORMED"), (0, "OTHER"), (99_999, "OTHER")])
def test_a_peer_makes_no_new_series(reason: int, label: str) -> None:
    metrics = Metrics()
    metrics.refused(Side.AGENT, reason)
    assert value(metrics, "fedloom_refusals_total", side="agent", reason=label) == 1
    assert {*Reason.__members__, "OTHER"} >= {label}


def test_what_runs_call_is_counted() -> None:
    metrics = Metrics()
    waiting: list[Any] = []
    with metrics.upload_waits(), metrics.crypto(CryptoStep.ADD):
        waiting.append(value(metrics, "fedloom_uploads_waiting"))
    assert [*waiting, value(metrics, "fedloom_uploads_waiting")] == [1, 0]
    assert value(metrics, "fedloom_crypto_seconds_count", step="add") == 1
    assert value(metrics, "fedloom_crypto_seconds_count", step="store") == 0


def test_the_last_round_s_means_are_shown_and_no_older_ones() -> None:
    metrics = Metrics()
    meter = RunMeter(metrics, 0.0)
    meter.measured({"accuracy": 0.5, "loss": 1.0})
    meter.measured({"loss": 0.75, "named by a peer": 1.0})
    found = {
        sample.labels["metric"]: sample.value
        for family in metrics.registry.collect()
        if family.name == "fedloom_quality"
        for sample in family.samples
    }
    assert found == {"loss": 0.75}
