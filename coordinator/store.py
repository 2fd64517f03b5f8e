"""What survives a restart: SQLite in WAL mode, one file.

Every method is one short transaction. `synchronous=NORMAL`: a killed process loses nothing; a power
cut may lose the last moments, never the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from coordinator import schema
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


class Store:
    """The coordinator's memory; one per process, any number of processes."""

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(self._engine, "connect", _set_pragmas)
        schema.METADATA.create_all(self._engine)

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    # enrolment

    def add_invitation(self, secret_sha256: bytes, agent_id: str, expires_at: float) -> None:
        """Remember that whoever knows the secret may become `agent_id`."""
        row = {"secret_sha256": secret_sha256, "agent_id": agent_id, "expires_at": expires_at}
        with self._engine.begin() as db:
            db.execute(sa.insert(schema.invitations).values(row))

    def redeem_invitation(self, secret_sha256: bytes, key_sha256: bytes, now: float) -> str:
        """Bind the invitation to a key, once, and return the agent's name.

        The same key may ask again: its first answer may have been lost.
        Raises Refused(INVALID_TOKEN or TOKEN_EXPIRED).
        """
        this = schema.invitations.c.secret_sha256 == secret_sha256
        unused = schema.invitations.c.public_key_sha256.is_(None)
        ours = unused | (schema.invitations.c.public_key_sha256 == key_sha256)
        with self._engine.begin() as db:
            # Bound before it is read: a read takes no lock, and two keys would both see it unused.
            bound = db.execute(
                sa.update(schema.invitations)
                .where(this & ours & (schema.invitations.c.expires_at > now))
                .values(public_key_sha256=key_sha256)
            )
            row = db.execute(sa.select(schema.invitations).where(this)).one_or_none()
            if row is None or row.public_key_sha256 not in (None, key_sha256):
                raise Refused(Reason.INVALID_TOKEN, "expected an unused enrolment token")
            if bound.rowcount != 1:
                raise Refused(Reason.TOKEN_EXPIRED, "the enrolment token has expired")
            agent = {
                "agent_id": row.agent_id,
                "public_key_sha256": key_sha256,
                "enrolled_at": now,
            }
            db.execute(
                insert(schema.agents)
                .values(agent)
                .on_conflict_do_update(index_elements=["agent_id"], set_=agent)
            )
            return str(row.agent_id)

    def agent_key(self, agent_id: str) -> bytes | None:
        """Return the SHA-256 of the enrolled agent's public key."""
        query = sa.select(schema.agents.c.public_key_sha256).where(
            schema.agents.c.agent_id == agent_id
        )
        with self._engine.connect() as db:
            return db.execute(query).scalar_one_or_none()

    def agents(self) -> list[tuple[str, float]]:
        """Return every agent's name and time of enrolment."""
        query = sa.select(schema.agents.c.agent_id, schema.agents.c.enrolled_at).order_by(
            schema.agents.c.agent_id
        )
        with self._engine.connect() as db:
            return [(row.agent_id, row.enrolled_at) for row in db.execute(query)]

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
            db.execute(insert(schema.rounds).values(row).on_conflict_do_nothing())

    def set_round_seconds(self, run_id: bytes, round_number: int, seconds: float) -> None:
        """Remember how long a round took, from its invitations to its last agent."""
        row = (schema.rounds.c.run_id == run_id) & (schema.rounds.c.round == round_number)
        with self._engine.begin() as db:
            db.execute(sa.update(schema.rounds).where(row).values(seconds=seconds))

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
            db.execute(sa.insert(schema.journal).values(row))

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
        statement = insert(schema.envelopes)
        statement = statement.on_conflict_do_update(
            index_elements=["run_id", "key_id", "recipient"],
            set_={"envelope": statement.excluded.envelope},
        )
        with self._engine.begin() as db:
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
        row = {"run_id": run_id, "round": round_number, "agent_id": agent_id, **values}
        with self._engine.begin() as db:
            db.execute(
                insert(schema.reports)
                .values(row)
                .on_conflict_do_update(index_elements=["run_id", "round", "agent_id"], set_=values)
            )

    def report_all(
        self, run_id: bytes, round_number: int, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add values to what is known of many agents' parts; all rows have the same keys."""
        if not rows:
            return
        statement = insert(schema.reports)
        values = {key: statement.excluded[key] for key in rows[0] if key not in ("agent_id",)}
        statement = statement.on_conflict_do_update(
            index_elements=["run_id", "round", "agent_id"], set_=values
        )
        with self._engine.begin() as db:
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


def _set_pragmas(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


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
