"""What survives a restart, in a database that several processes may use at once.

Every method is one short transaction, done when it returns; it raises StorageFault when the
database does not do it, and then nothing of it is done.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from coordinator import database, schema
from coordinator.roster import Roster
from coordinator.run_state import Phase, Wish
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused


@dataclass(frozen=True)
class RunRecord:
    """A run as stored."""

    run_id: bytes
    name: str
    config: str
    plan: ArtifactReference
    phase: Phase
    reason: Reason | None
    round: int
    attempt: int
    wish: Wish
    created_at: float = 0.0  # seconds since 1970


@dataclass(frozen=True)
class JournalEntry:
    """What happened to an open run, in order; `at` in seconds since 1970."""

    at: float
    kind: str
    body: bytes


@dataclass(frozen=True)
class RoundRecord:
    """A finished round: what repeats it."""

    round: int
    attempt: int
    weight_cap: int
    slots: tuple[int, ...]
    sum: ArtifactReference
    seconds: float = 0.0
    cohort_digest: bytes = b""
    key_id: int = 0
    previous_round: int = 0
    clip: float = 0.0
    opened: ArtifactReference | None = None  # the sum as agents returned it
    quality: tuple[tuple[str, float], ...] = ()  # means by metric, of the state before the round
    training_loss: float | None = None  # mean, where the sum opened to it


class Store:
    """The coordinator's memory; one per process, any number of processes."""

    def __init__(self, place: Path | str) -> None:
        """Open a SQLite file, or a PostgreSQL URL; see `coordinator.database`."""
        self._engine = database.open_database(place)
        # A command that is done says good-bye to the server without having to think of it.
        self._finalizer = weakref.finalize(self, self._engine.dispose)
        self.roster = Roster(self._engine)

    @property
    def engine(self) -> sa.Engine:
        """The database, for what shares it or watches it (`audit`, `metrics`)."""
        return self._engine

    def close(self) -> None:
        """Release the file or the connections."""
        self._finalizer()

    # runs

    def add_run(
        self, run_id: bytes, name: str, config: str, plan: ArtifactReference, now: float
    ) -> None:
        """Queue a run."""
        row = {
            "run_id": run_id,
            "name": name,
            "config": config,
            "plan_sha256": plan.sha256,
            "plan_size": plan.size_bytes,
            "phase": Phase.GATHERING.value,
            "round": 1,
            "attempt": 0,
            "wish": Wish.RUN.value,
            "created_at": now,
        }
        with self._engine.begin() as db:
            db.execute(sa.insert(schema.runs).values(row))

    def runs(self) -> list[RunRecord]:
        """Return all runs, oldest first."""
        with self._engine.connect() as db:
            rows = db.execute(sa.select(schema.runs).order_by(schema.runs.c.number)).all()
        return [_run_record(row) for row in rows]

    def run(self, run_id: bytes) -> RunRecord:
        """Return one run."""
        with self._engine.connect() as db:
            row = db.execute(
                sa.select(schema.runs).where(schema.runs.c.run_id == run_id)
            ).one_or_none()
        if row is None:
            raise Refused(Reason.NOT_FOUND, f"expected a run {run_id.hex()}, found none")
        return _run_record(row)

    def update_run(
        self,
        run_id: bytes,
        phase: Phase,
        round_number: int,
        attempt: int,
        reason: Reason | None = None,
    ) -> None:
        """Remember how far a run is; an attempt is stored before it is announced."""
        values = {
            "phase": phase.value,
            "round": round_number,
            "attempt": attempt,
            "reason": None if reason is None else reason.value,
        }
        with self._engine.begin() as db:
            db.execute(sa.update(schema.runs).where(schema.runs.c.run_id == run_id).values(values))

    def forget_run(self, run_id: bytes) -> None:
        """Delete a run that is over, with all that is known of it; its sums become garbage.

        Raises Refused for a run that is not over.
        """
        this = schema.runs.c.run_id == run_id
        over = schema.runs.c.phase.in_([phase.value for phase in Phase if phase.over])
        with self._engine.begin() as db:
            if db.execute(sa.delete(schema.runs).where(this & over)).rowcount != 1:
                raise Refused(Reason.NOT_FOUND, f"expected a run that is over, {run_id.hex()}")
            for table in (schema.rounds, schema.journal, schema.envelopes, schema.reports):
                db.execute(sa.delete(table).where(table.c.run_id == run_id))

    def add_round(self, run_id: bytes, record: RoundRecord) -> None:
        """Append a round to the run's history; a repeat changes nothing."""
        row = {
            "run_id": run_id,
            "round": record.round,
            "attempt": record.attempt,
            "weight_cap": record.weight_cap,
            "slots": json.dumps(record.slots),
            "sum_sha256": record.sum.sha256,
            "sum_size": record.sum.size_bytes,
            "seconds": record.seconds,
            "cohort_digest": record.cohort_digest,
            "key_id": record.key_id,
            "previous_round": record.previous_round,
            "clip": record.clip,
        }
        with self._engine.begin() as db:
            db.execute(database.insert(db, schema.rounds).values(row).on_conflict_do_nothing())

    def close_round(
        self,
        run_id: bytes,
        round_number: int,
        seconds: float,
        quality: Mapping[str, float] | None = None,
        training_loss: float | None = None,
    ) -> None:
        """Remember how long a round took, from its invitations to its last agent, and its means."""
        row = (schema.rounds.c.run_id == run_id) & (schema.rounds.c.round == round_number)
        values = {
            "seconds": seconds,
            "quality": json.dumps(dict(quality)) if quality else None,
            "training_loss": training_loss,
        }
        with self._engine.begin() as db:
            db.execute(sa.update(schema.rounds).where(row).values(values))

    def set_opened(self, run_id: bytes, round_number: int, opened: ArtifactReference) -> None:
        """Remember the sum that agents returned."""
        row = (schema.rounds.c.run_id == run_id) & (schema.rounds.c.round == round_number)
        values = {"opened_sha256": opened.sha256, "opened_size": opened.size_bytes}
        with self._engine.begin() as db:
            db.execute(sa.update(schema.rounds).where(row).values(values))

    def rounds(self, run_id: bytes) -> tuple[RoundRecord, ...]:
        """Return the run's finished rounds in order."""
        query = (
            sa.select(schema.rounds)
            .where(schema.rounds.c.run_id == run_id)
            .order_by(schema.rounds.c.round)
        )
        with self._engine.connect() as db:
            rows = db.execute(query).all()
        return tuple(
            RoundRecord(
                row.round,
                row.attempt,
                row.weight_cap,
                tuple(json.loads(row.slots)),
                ArtifactReference(row.sum_sha256, row.sum_size),
                row.seconds,
                row.cohort_digest,
                row.key_id,
                row.previous_round,
                row.clip,
                _opened(row),
                tuple(json.loads(row.quality or "{}").items()),
                row.training_loss,
            )
            for row in rows
        )

    # an open run

    def wish(self, run_id: bytes, wish: Wish) -> None:
        """Remember what the operator wants of a run; the serving process looks for it."""
        with self._engine.begin() as db:
            row = schema.runs.c.run_id == run_id
            db.execute(sa.update(schema.runs).where(row).values(wish=wish.value))

    def append_journal(self, run_id: bytes, entry: JournalEntry) -> None:
        """Remember what happened, before anything is done about it."""
        row = {"run_id": run_id, "at": entry.at, "kind": entry.kind, "body": entry.body}
        with self._engine.begin() as db:
            db.execute(_INSERT_ENTRY, row)

    def restart_journal(self, run_id: bytes, first: JournalEntry | None) -> None:
        """Replace the run's journal by one entry, or by none."""
        with self._engine.begin() as db:
            db.execute(sa.delete(schema.journal).where(schema.journal.c.run_id == run_id))
            if first is not None:
                row = {"run_id": run_id, "at": first.at, "kind": first.kind, "body": first.body}
                db.execute(sa.insert(schema.journal).values(row))

    def journal(self, run_id: bytes) -> list[JournalEntry]:
        """Return what happened, in order."""
        query = (
            sa.select(schema.journal)
            .where(schema.journal.c.run_id == run_id)
            .order_by(schema.journal.c.number)
        )
        with self._engine.connect() as db:
            return [JournalEntry(row.at, row.kind, row.body) for row in db.execute(query)]

    # run keys, wrapped

    def put_envelopes(self, run_id: bytes, key_id: int, envelopes: Mapping[str, bytes]) -> None:
        """Keep a wrapped key, opaque, by recipient."""
        rows = [
            {"run_id": run_id, "recipient": recipient, "key_id": key_id, "envelope": envelope}
            for recipient, envelope in envelopes.items()
        ]
        if not rows:
            return  # to SQLAlchemy no rows mean one row of defaults
        with self._engine.begin() as db:
            statement = database.insert(db, schema.envelopes)
            statement = statement.on_conflict_do_update(
                index_elements=["run_id", "key_id", "recipient"],
                set_={"envelope": statement.excluded.envelope},
            )
            db.execute(statement, rows)

    def envelopes(self, run_id: bytes) -> dict[int, dict[str, bytes]]:
        """Return the run's wrapped keys, by number and recipient."""
        query = sa.select(schema.envelopes).where(schema.envelopes.c.run_id == run_id)
        found: dict[int, dict[str, bytes]] = {}
        with self._engine.connect() as db:
            for row in db.execute(query):
                found.setdefault(row.key_id, {})[row.recipient] = row.envelope
        return found

    # what agents report

    def report(self, run_id: bytes, round_number: int, agent_id: str, **values: Any) -> None:
        """Add values to what is known of an agent's part in a round."""
        self.report_all(run_id, round_number, [{"agent_id": agent_id, **values}])

    def report_all(
        self, run_id: bytes, round_number: int, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add values to what is known of many agents' parts; all rows have the same keys."""
        if not rows:
            return
        with self._engine.begin() as db:
            statement = _upsert_reports(db.dialect.name, frozenset(rows[0]) - {"agent_id"})
            db.execute(
                statement, [{"run_id": run_id, "round": round_number, **row} for row in rows]
            )

    def took_part(self, run_id: bytes, agent_id: str) -> bool:
        """Whether the agent reported anything in the run."""
        mine = (schema.reports.c.run_id == run_id) & (schema.reports.c.agent_id == agent_id)
        with self._engine.connect() as db:
            return db.execute(sa.select(sa.exists().where(mine))).scalar_one()

    def reports(self, run_id: bytes, first_round: int = 0) -> list[dict[str, Any]]:
        """Return the reports of a run from a round on, by round and agent."""
        wanted = (schema.reports.c.run_id == run_id) & (schema.reports.c.round >= first_round)
        query = (
            sa.select(schema.reports)
            .where(wanted)
            .order_by(schema.reports.c.round, schema.reports.c.agent_id)
        )
        with self._engine.connect() as db:
            return [dict(row._mapping) for row in db.execute(query)]


# Made once, with their values as parameters: making a statement costs more than executing it.
_INSERT_ENTRY = sa.insert(schema.journal)


@lru_cache
def _upsert_reports(dialect: str, columns: frozenset[str]) -> sa.Insert:
    statement = database.insert_for(dialect, schema.reports)
    values = {column: statement.excluded[column] for column in columns}
    return statement.on_conflict_do_update(
        index_elements=["run_id", "round", "agent_id"], set_=values
    )


def _run_record(row: Any) -> RunRecord:
    return RunRecord(
        row.run_id,
        row.name,
        row.config,
        ArtifactReference(row.plan_sha256, row.plan_size),
        Phase(row.phase),
        None if row.reason is None else Reason(row.reason),
        row.round,
        row.attempt,
        Wish(row.wish),
        row.created_at,
    )


def _opened(row: Any) -> ArtifactReference | None:
    if row.opened_sha256 is None:
        return None
    return ArtifactReference(row.opened_sha256, row.opened_size)
