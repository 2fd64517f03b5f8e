"""What survives a restart: SQLite in WAL mode, one file.

Every method is one short transaction. `synchronous=NORMAL`: a killed process loses nothing; a power
cut may lose the last moments, never the file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from coordinator.run_state import Phase
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused

_METADATA = sa.MetaData()

_agents = sa.Table(
    "agents",
    _METADATA,
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("public_key_sha256", sa.LargeBinary, nullable=False),
    sa.Column("enrolled_at", sa.Float, nullable=False),
)
_invitations = sa.Table(
    "invitations",
    _METADATA,
    sa.Column("secret_sha256", sa.LargeBinary, primary_key=True),
    sa.Column("agent_id", sa.String, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("public_key_sha256", sa.LargeBinary),  # of the key that used it, or NULL
)
_runs = sa.Table(
    "runs",
    _METADATA,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.LargeBinary, unique=True, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("config", sa.String, nullable=False),  # the run file, as TOML text
    sa.Column("plan_sha256", sa.LargeBinary, nullable=False),
    sa.Column("plan_size", sa.Integer, nullable=False),
    sa.Column("phase", sa.String, nullable=False),
    sa.Column("reason", sa.Integer),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),  # latest of that round, used or not
    sa.Column("key_id", sa.Integer, nullable=False),  # latest run key; 0 before the first
    sa.Column("created_at", sa.Float, nullable=False),
)
_rounds = sa.Table(
    "rounds",
    _METADATA,
    sa.Column("run_id", sa.LargeBinary, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("weight_cap", sa.Integer, nullable=False),
    sa.Column("slots", sa.String, nullable=False),  # JSON list
    sa.Column("sum_sha256", sa.LargeBinary, nullable=False),
    sa.Column("sum_size", sa.Integer, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
)
_envelopes = sa.Table(
    "envelopes",
    _METADATA,
    sa.Column("run_id", sa.LargeBinary, primary_key=True),
    sa.Column("recipient", sa.String, primary_key=True),
    sa.Column("key_id", sa.Integer, nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),  # opaque to us
)
_reports = sa.Table(
    "reports",
    _METADATA,
    sa.Column("run_id", sa.LargeBinary, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("progress", sa.Float),  # of local training, 0..1
    sa.Column("training_loss", sa.Float),
    sa.Column("training_seconds", sa.Float),
    sa.Column("sent_bytes", sa.Integer),
    sa.Column("received_bytes", sa.Integer),
    sa.Column("state_sha256", sa.LargeBinary),
    sa.Column("evaluated", sa.Integer),
    sa.Column("correct", sa.Integer),
    sa.Column("evaluation_loss", sa.Float),
    sa.Column("saturated", sa.Integer),
    sa.Column("refusal", sa.Integer),
)


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
    key_id: int


@dataclass(frozen=True)
class RoundRecord:
    """A finished round: what repeats it."""

    round: int
    attempt: int
    weight_cap: int
    slots: tuple[int, ...]
    sum: ArtifactReference
    seconds: float = 0.0


class Store:
    """The coordinator's memory; one per process, any number of processes."""

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
        sa.event.listen(self._engine, "connect", _set_pragmas)
        _METADATA.create_all(self._engine)

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    # enrolment

    def add_invitation(self, secret_sha256: bytes, agent_id: str, expires_at: float) -> None:
        """Remember that whoever knows the secret may become `agent_id`."""
        row = {"secret_sha256": secret_sha256, "agent_id": agent_id, "expires_at": expires_at}
        with self._engine.begin() as db:
            db.execute(sa.insert(_invitations).values(row))

    def redeem_invitation(self, secret_sha256: bytes, key_sha256: bytes, now: float) -> str:
        """Bind the invitation to a key, once, and return the agent's name.

        The same key may ask again: its first answer may have been lost.
        Raises Refused(INVALID_TOKEN or TOKEN_EXPIRED).
        """
        this = _invitations.c.secret_sha256 == secret_sha256
        unused = _invitations.c.public_key_sha256.is_(None)
        ours = unused | (_invitations.c.public_key_sha256 == key_sha256)
        with self._engine.begin() as db:
            # Bound before it is read: a read takes no lock, and two keys would both see it unused.
            bound = db.execute(
                sa.update(_invitations)
                .where(this & ours & (_invitations.c.expires_at > now))
                .values(public_key_sha256=key_sha256)
            )
            row = db.execute(sa.select(_invitations).where(this)).one_or_none()
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
                insert(_agents)
                .values(agent)
                .on_conflict_do_update(index_elements=["agent_id"], set_=agent)
            )
            return str(row.agent_id)

    def agent_key(self, agent_id: str) -> bytes | None:
        """Return the SHA-256 of the enrolled agent's public key."""
        query = sa.select(_agents.c.public_key_sha256).where(_agents.c.agent_id == agent_id)
        with self._engine.connect() as db:
            return db.execute(query).scalar_one_or_none()

    def agents(self) -> list[tuple[str, float]]:
        """Return every agent's name and time of enrolment."""
        query = sa.select(_agents.c.agent_id, _agents.c.enrolled_at).order_by(_agents.c.agent_id)
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
            "key_id": 0,
            "created_at": now,
        }
        with self._engine.begin() as db:
            db.execute(sa.insert(_runs).values(row))

    def runs(self) -> list[RunRecord]:
        """Return all runs, oldest first."""
        with self._engine.connect() as db:
            rows = db.execute(sa.select(_runs).order_by(_runs.c.number)).all()
        return [_run_record(row) for row in rows]

    def run(self, run_id: bytes) -> RunRecord:
        """Return one run."""
        with self._engine.connect() as db:
            row = db.execute(sa.select(_runs).where(_runs.c.run_id == run_id)).one_or_none()
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
            db.execute(sa.update(_runs).where(_runs.c.run_id == run_id).values(values))

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
        }
        with self._engine.begin() as db:
            db.execute(insert(_rounds).values(row).on_conflict_do_nothing())

    def set_round_seconds(self, run_id: bytes, round_number: int, seconds: float) -> None:
        """Remember how long a round took, from its invitations to its last agent."""
        row = (_rounds.c.run_id == run_id) & (_rounds.c.round == round_number)
        with self._engine.begin() as db:
            db.execute(sa.update(_rounds).where(row).values(seconds=seconds))

    def rounds(self, run_id: bytes) -> tuple[RoundRecord, ...]:
        """Return the run's finished rounds in order."""
        query = sa.select(_rounds).where(_rounds.c.run_id == run_id).order_by(_rounds.c.round)
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
            )
            for row in rows
        )

    # run keys, wrapped

    def next_key_id(self, run_id: bytes) -> int:
        """Reserve the number of a new run key."""
        with self._engine.begin() as db:
            db.execute(
                sa.update(_runs).where(_runs.c.run_id == run_id).values(key_id=_runs.c.key_id + 1)
            )
            query = sa.select(_runs.c.key_id).where(_runs.c.run_id == run_id)
            return int(db.execute(query).scalar_one())

    def put_envelopes(
        self, run_id: bytes, key_id: int, envelopes: Sequence[tuple[str, bytes]]
    ) -> None:
        """Keep wrapped keys, opaque, by recipient."""
        rows = [
            {"run_id": run_id, "recipient": recipient, "key_id": key_id, "envelope": envelope}
            for recipient, envelope in envelopes
        ]
        statement = insert(_envelopes)
        statement = statement.on_conflict_do_update(
            index_elements=["run_id", "recipient"],
            set_={"key_id": statement.excluded.key_id, "envelope": statement.excluded.envelope},
        )
        if not rows:
            return  # to SQLAlchemy no rows mean one row of defaults
        with self._engine.begin() as db:
            db.execute(statement, rows)

    def envelopes(self, run_id: bytes, key_id: int) -> dict[str, bytes]:
        """Return the wrapped keys of one run key by recipient."""
        query = sa.select(_envelopes.c.recipient, _envelopes.c.envelope).where(
            _envelopes.c.run_id == run_id, _envelopes.c.key_id == key_id
        )
        with self._engine.connect() as db:
            return {row.recipient: row.envelope for row in db.execute(query)}

    # what agents report

    def report(self, run_id: bytes, round_number: int, agent_id: str, **values: Any) -> None:
        """Add values to what is known of an agent's part in a round."""
        row = {"run_id": run_id, "round": round_number, "agent_id": agent_id, **values}
        with self._engine.begin() as db:
            db.execute(
                insert(_reports)
                .values(row)
                .on_conflict_do_update(index_elements=["run_id", "round", "agent_id"], set_=values)
            )

    def took_part(self, run_id: bytes, agent_id: str) -> bool:
        """Whether the agent reported anything in the run."""
        mine = (_reports.c.run_id == run_id) & (_reports.c.agent_id == agent_id)
        with self._engine.connect() as db:
            return db.execute(sa.select(sa.exists().where(mine))).scalar_one()

    def reports(self, run_id: bytes) -> list[dict[str, Any]]:
        """Return all reports of a run, by round and agent."""
        query = (
            sa.select(_reports)
            .where(_reports.c.run_id == run_id)
            .order_by(_reports.c.round, _reports.c.agent_id)
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
        row.key_id,
    )
