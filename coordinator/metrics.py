"""What the coordinator counts, for Prometheus.

No label holds anything that a peer or an operator named: labels are enums and tables of this code
(phases, reasons, RPCs), so that neither agents nor runs can make new series. Who did what in which
run is the business of `progress` and `audit`.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any

import prometheus_client as prometheus
import sqlalchemy as sa
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from coordinator import schema
from coordinator.faults import StorageFault
from coordinator.run_state import Phase, RunState
from coordinator.sessions import Sessions
from fedloom.errors import Reason
from fedloom.quality import Metric as Measure
from fedloom.version import software

LAG_SECONDS = 0.5  # between looks at the event loop
_PHASE_BUCKETS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_CRYPTO_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_STORE_BUCKETS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 30)
_STALENESS_BUCKETS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
_LAG_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class RoundOutcome(StrEnum):
    """How an attempt at a round ended."""

    FINISHED = "finished"
    VOID = "void"  # agents could not use its sum; the run goes on
    FAILED = "failed"  # too few updates, or a sum that could not be stored


class CryptoStep(StrEnum):
    """Arithmetic on updates; one observation each."""

    ADD = "add"  # one update into the sum
    STORE = "store"  # the sum, encoded and written
    CORRECT = "correct"  # the masks left in the sum, from the members' releases


class Side(StrEnum):
    """Who refused."""

    COORDINATOR = "coordinator"
    AGENT = "agent"


class Metrics:
    """The series of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rounds = self._counter("rounds", "Attempts at rounds that ended.", "outcome")
        self.phase_seconds = self._histogram(
            "phase_seconds", "How long runs stayed in a phase.", _PHASE_BUCKETS, "phase"
        )
        self.crypto_seconds = self._histogram(
            "crypto_seconds", "Arithmetic on updates.", _CRYPTO_BUCKETS, "step"
        )
        self.uploads_waiting = prometheus.Gauge(
            "fedloom_uploads_waiting", "Whole updates not in a sum yet.", registry=self.registry
        )
        self.refusals = self._counter("refusals", "Refusals on the wire.", "side", "reason")
        self.rpcs = self._counter("rpcs", "Calls that ended.", "rpc", "outcome")
        self.open_rpcs = prometheus.Gauge(
            "fedloom_rpcs_open", "Calls being served.", ["rpc"], registry=self.registry
        )
        self.received_bytes = self._counter("received_bytes", "Messages from peers.", "service")
        self.sent_bytes = self._counter("sent_bytes", "Messages to peers.", "service")
        self.store_writes = self._counter("store_writes", "Statements that write.", "table")
        self.store_seconds = self._histogram(
            "store_transaction_seconds", "Transactions with the commit.", _STORE_BUCKETS, "kind"
        )
        self.loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds", "How late the event loop was.", _LAG_BUCKETS
        )
        self.staleness = self._histogram(
            "update_staleness_rounds",
            "How old updates in the sums of asynchronous runs were.",
            _STALENESS_BUCKETS,
        )
        self.quality = prometheus.Gauge(
            "fedloom_quality",
            "Mean quality that the last finished round reported, of the model it began with.",
            ["metric"],
            registry=self.registry,
        )
        self._name_series()
        prometheus.ProcessCollector(registry=self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(f"fedloom_{name}", what, labels, registry=self.registry)

    def _histogram(
        self, name: str, what: str, buckets: tuple[float, ...], *labels: str
    ) -> prometheus.Histogram:
        return prometheus.Histogram(
            f"fedloom_{name}", what, labels, buckets=buckets, registry=self.registry
        )

    def _name_series(self) -> None:
        """Show zeros from the start: an alert on a series that does not exist stays silent."""
        for outcome in RoundOutcome:
            self.rounds.labels(outcome)
        for phase in Phase:
            self.phase_seconds.labels(phase.value)
        for step in CryptoStep:
            self.crypto_seconds.labels(step)
        for table in schema.METADATA.tables:
            self.store_writes.labels(table)
        build = prometheus.Gauge(
            "fedloom_build_info", "What runs here.", ["version"], registry=self.registry
        )
        build.labels(software()).set(1)

    # what runs call

    def round_ended(self, outcome: RoundOutcome) -> None:
        """Count an attempt at a round."""
        self.rounds.labels(outcome).inc()

    def crypto(self, step: CryptoStep) -> AbstractContextManager[Any]:
        """Time the block as one such step."""
        return self.crypto_seconds.labels(step).time()

    def upload_waits(self) -> AbstractContextManager[Any]:
        """Count a whole update as waiting while the block runs."""
        return self.uploads_waiting.track_inprogress()

    # what the process calls

    def refused(self, side: Side, reason: int) -> None:
        """Count a refusal; a number that this version does not know is no series of its own."""
        name = Reason(reason).name if reason in _REASONS else "OTHER"
        self.refusals.labels(side, name).inc()

    def watch_sessions(self, sessions: Sessions) -> None:
        """Show how many agents are connected and how much they have not read."""
        self.registry.register(_SessionsCollector(sessions))

    def watch_store(self, engine: sa.Engine) -> None:
        """Time the store's transactions, count its writes, and show what it holds."""
        self.registry.register(_StoreCollector(engine))
        sa.event.listen(engine, "begin", _remember_begin)
        sa.event.listen(engine, "commit", _remember_commit)
        sa.event.listen(engine, "after_execute", self._count_write)
        sa.event.listen(engine, "checkin", self._time_transaction)

    def _count_write(self, connection: sa.Connection, statement: object, *_: object) -> None:
        if isinstance(statement, sa.Insert | sa.Update | sa.Delete):
            self.store_writes.labels(str(statement.table)).inc()

    def _time_transaction(self, _: object, record: Any) -> None:
        # At the connection's return: SQLAlchemy tells of a commit before it waits for the disk.
        begun, kind = record.info.pop(_BEGUN, None), record.info.pop(_KIND, "read")
        if begun is not None:
            self.store_seconds.labels(kind).observe(time.perf_counter() - begun)

    async def watch_loop(self) -> None:
        """Measure for ever how late the event loop wakes: what everything else waits for."""
        while True:
            due = time.perf_counter() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self.loop_lag_seconds.observe(max(0.0, time.perf_counter() - due))


class RunMeter:
    """One run's rounds and phases, told from its states alone; times in seconds of one clock.

    Not to be told of what is replayed from the journal: that was counted before the restart.
    """

    def __init__(self, metrics: Metrics, now: float) -> None:
        self._metrics = metrics
        self._since = now

    def moved(self, before: RunState, after: RunState, now: float) -> None:
        """Observe a phase that ended, and the attempt at a round that ended with it."""
        if (before.phase, before.round) != (after.phase, after.round):
            self._metrics.phase_seconds.labels(before.phase.value).observe(now - self._since)
            self._since = now
        if after.policy.is_asynchronous and after.completed > before.completed:
            for agent in before.uploaded:
                self._metrics.staleness.observe(before.staleness[agent])
        if (outcome := _outcome(before, after)) is not None:
            self._metrics.round_ended(outcome)

    def measured(self, quality: Mapping[str, float]) -> None:
        """Show what a finished round told, and nothing older beside it."""
        self._metrics.quality.clear()
        for metric in Measure:
            if metric.value in quality:
                self._metrics.quality.labels(metric.value).set(quality[metric.value])


def _outcome(before: RunState, after: RunState) -> RoundOutcome | None:
    if after.completed > before.completed:
        return RoundOutcome.FINISHED
    if after.round > before.round:
        return RoundOutcome.VOID
    ended = after.phase is Phase.FAILED and before.phase not in (Phase.GATHERING, Phase.FAILED)
    if after.failures > before.failures or ended:
        return RoundOutcome.FAILED
    return None


_REASONS = frozenset(Reason)
_BEGUN, _KIND = "fedloom begun", "fedloom kind"


def _remember_begin(connection: sa.Connection) -> None:
    connection.info[_BEGUN] = time.perf_counter()


def _remember_commit(connection: sa.Connection) -> None:
    connection.info[_KIND] = "write"


class _SessionsCollector(Collector):
    """Reads the sessions as they are when somebody asks; from another thread than they live in."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        depths = [session.outbox.qsize() for session in self._sessions]  # iterates over a copy
        yield GaugeMetricFamily(
            "fedloom_agents_connected", "Agents with a control stream.", len(depths)
        )
        yield GaugeMetricFamily(
            "fedloom_outbox_messages", "Messages that agents have not read.", sum(depths)
        )
        yield GaugeMetricFamily(
            "fedloom_outbox_longest_messages",
            "The longest of these queues.",
            max(depths, default=0),
        )


class _StoreCollector(Collector):
    """Counts rows when somebody asks."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        try:
            agents, runs = self._count()
        except (sa.exc.SQLAlchemyError, StorageFault):
            return  # a store in trouble must not hide the series that say so
        yield GaugeMetricFamily("fedloom_agents_enrolled", "Agents with a certificate.", agents)
        family = GaugeMetricFamily("fedloom_runs", "Runs in the store.", labels=["phase"])
        for phase in Phase:
            family.add_metric([phase.value], runs.get(phase.value, 0))
        yield family

    def _count(self) -> tuple[int, dict[str, int]]:
        phase, count = schema.runs.c.phase, sa.func.count()
        with self._engine.connect() as db:
            agents = db.execute(sa.select(count).select_from(schema.agents)).scalar_one()
            runs = db.execute(sa.select(phase, count).group_by(phase)).all()
        return agents, {str(name): int(found) for name, found in runs}

    def describe(self) -> Iterator[Metric]:
        """Name the series without asking the store."""
        yield GaugeMetricFamily("fedloom_agents_enrolled", "")
        yield GaugeMetricFamily("fedloom_runs", "")
