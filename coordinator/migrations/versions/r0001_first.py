"""The first released schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table."""
    _make_roster()
    _make_runs()
    _make_rounds()
    _make_open_run()
    _make_reports()


def _make_roster() -> None:
    op.create_table(
        "agents",
        sa.Column("agent_id", sa.String, nullable=False),
        sa.Column("public_key_sha256", sa.LargeBinary, nullable=False),
        sa.Column("next_key_sha256", sa.LargeBinary),
        sa.Column("enrolled_at", sa.Float, nullable=False),
        sa.Column("certificate_until", sa.Float, nullable=False),
        sa.Column("banned_at", sa.Float),
        sa.Column("ban_reason", sa.String),
        sa.Column("last_seen", sa.Float),
        sa.PrimaryKeyConstraint("agent_id", name="pk_agents"),
    )
    op.create_table(
        "invitations",
        sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("uses", sa.Integer, nullable=False),
        sa.Column("used", sa.Integer, nullable=False),
        sa.Column("first_number", sa.Integer),
        sa.Column("revoked_at", sa.Float),
        sa.PrimaryKeyConstraint("secret_sha256", name="pk_invitations"),
        sa.UniqueConstraint("name", "first_number", name="uq_invitations_name"),
    )
    op.create_table(
        "certificate_requests",
        sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
        sa.Column("public_key_sha256", sa.LargeBinary, nullable=False),
        sa.Column("agent_id", sa.String, nullable=False),
        sa.Column("request", sa.LargeBinary, nullable=False),
        sa.Column("former_key_signature", sa.LargeBinary, nullable=False),
        sa.Column("requested_at", sa.Float, nullable=False),
        sa.Column("chain", sa.LargeBinary),
        sa.PrimaryKeyConstraint(
            "secret_sha256", "public_key_sha256", name="pk_certificate_requests"
        ),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("facts", sa.String, nullable=False),
        sa.Column("previous_sha256", sa.LargeBinary, nullable=False),
        sa.Column("sha256", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
    )


def _make_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("number", _ROW_NUMBER, nullable=False),
        sa.Column("run_id", sa.LargeBinary, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("config", sa.String, nullable=False),
        sa.Column("plan_sha256", sa.LargeBinary, nullable=False),
        sa.Column("plan_size", sa.BigInteger, nullable=False),
        sa.Column("phase", sa.String, nullable=False),
        sa.Column("reason", sa.Integer),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("wish", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_runs"),
        sa.UniqueConstraint("run_id", name="uq_runs_run_id"),
    )


def _make_rounds() -> None:
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.LargeBinary, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("weight_cap", sa.Integer, nullable=False),
        sa.Column("slots", sa.String, nullable=False),
        sa.Column("sum_sha256", sa.LargeBinary, nullable=False),
        sa.Column("sum_size", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("cohort_digest", sa.LargeBinary, nullable=False),
        sa.Column("key_id", sa.Integer, nullable=False),
        sa.Column("previous_round", sa.Integer, nullable=False),
        sa.Column("clip", sa.Float, nullable=False),
        sa.Column("opened_sha256", sa.LargeBinary),
        sa.Column("opened_size", sa.BigInteger),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_rounds"),
    )


def _make_open_run() -> None:
    op.create_table(
        "journal",
        sa.Column("number", _ROW_NUMBER, nullable=False),
        sa.Column("run_id", sa.LargeBinary, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_journal"),
    )
    op.create_index("ix_journal_run_id", "journal", ["run_id"])
    op.create_table(
        "envelopes",
        sa.Column("run_id", sa.LargeBinary, nullable=False),
        sa.Column("key_id", sa.Integer, nullable=False),
        sa.Column("recipient", sa.String, nullable=False),
        sa.Column("envelope", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "key_id", "recipient", name="pk_envelopes"),
    )


def _make_reports() -> None:
    op.create_table(
        "reports",
        sa.Column("run_id", sa.LargeBinary, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("agent_id", sa.String, nullable=False),
        sa.Column("progress", sa.Float),
        sa.Column("training_loss", sa.Float),
        sa.Column("training_seconds", sa.Float),
        sa.Column("sent_bytes", sa.BigInteger),
        sa.Column("received_bytes", sa.BigInteger),
        sa.Column("state_sha256", sa.LargeBinary),
        sa.Column("evaluated", sa.BigInteger),
        sa.Column("correct", sa.BigInteger),
        sa.Column("evaluation_loss", sa.Float),
        sa.Column("saturated", sa.BigInteger),
        sa.Column("saturated_share", sa.Float),
        sa.Column("refusal", sa.Integer),
        sa.PrimaryKeyConstraint("run_id", "round", "agent_id", name="pk_reports"),
    )
