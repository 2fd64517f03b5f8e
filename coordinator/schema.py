"""The store's tables. What is changed here needs a revision in `coordinator/migrations`."""

import sqlalchemy as sa

# Constraints have names so that a later revision can say which one it changes.
METADATA = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)
# SQLite numbers rows by itself only in a column of exactly this type.
_RowNumber = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

agents = sa.Table(
    "agents",
    METADATA,
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("public_key_sha256", sa.LargeBinary, nullable=False),
    sa.Column("next_key_sha256", sa.LargeBinary),  # of a renewal that the agent has not used yet
    sa.Column("enrolled_at", sa.Float, nullable=False),
    sa.Column("certificate_until", sa.Float, nullable=False),
    sa.Column("banned_at", sa.Float),
    sa.Column("ban_reason", sa.String),
    sa.Column("last_seen", sa.Float),
)
invitations = sa.Table(
    "invitations",
    METADATA,
    sa.Column("secret_sha256", sa.LargeBinary, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("uses", sa.Integer, nullable=False),
    sa.Column("used", sa.Integer, nullable=False),
    sa.Column("first_number", sa.Integer),  # of NAME-1, ...; NULL: one use, NAME itself
    sa.Column("revoked_at", sa.Float),
    sa.UniqueConstraint("name", "first_number"),  # of two made at once, one fails
)
certificate_requests = sa.Table(
    "certificate_requests",
    METADATA,
    sa.Column("secret_sha256", sa.LargeBinary, primary_key=True),  # empty: a renewal
    sa.Column("public_key_sha256", sa.LargeBinary, primary_key=True),
    sa.Column("agent_id", sa.String, nullable=False),
    sa.Column("request", sa.LargeBinary, nullable=False),  # PKCS #10, DER
    sa.Column("former_key_signature", sa.LargeBinary, nullable=False),  # of a renewal, or empty
    sa.Column("requested_at", sa.Float, nullable=False),
    sa.Column("chain", sa.LargeBinary),  # PEM, leaf first; NULL: not signed yet
)
runs = sa.Table(
    "runs",
    METADATA,
    sa.Column("number", _RowNumber, primary_key=True),
    sa.Column("run_id", sa.LargeBinary, unique=True, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("config", sa.String, nullable=False),  # the run file, as TOML text
    sa.Column("plan_sha256", sa.LargeBinary, nullable=False),
    sa.Column("plan_size", sa.BigInteger, nullable=False),
    sa.Column("phase", sa.String, nullable=False),
    sa.Column("reason", sa.Integer),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),  # latest of that round, used or not
    sa.Column("wish", sa.String, nullable=False),  # the operator's: run, pause or cancel
    sa.Column("created_at", sa.Float, nullable=False),
)
rounds = sa.Table(
    "rounds",
    METADATA,
    sa.Column("run_id", sa.LargeBinary, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("weight_cap", sa.Integer, nullable=False),
    sa.Column("slots", sa.String, nullable=False),  # JSON list
    sa.Column("sum_sha256", sa.LargeBinary, nullable=False),
    sa.Column("sum_size", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("cohort_digest", sa.LargeBinary, nullable=False),  # empty without masks
    sa.Column("key_id", sa.Integer, nullable=False),  # of the run key; 0 without
    sa.Column("previous_round", sa.Integer, nullable=False),  # 0 for the first
    sa.Column("clip", sa.Float, nullable=False),
    sa.Column("opened_sha256", sa.LargeBinary),  # of the sum that agents returned, or NULL
    sa.Column("opened_size", sa.BigInteger),
    sa.Column("quality", sa.String),  # JSON object: metric -> mean before the round; NULL: not told
    sa.Column("training_loss", sa.Float),  # mean that the sum opened to; NULL: not told
)
journal = sa.Table(  # what happened to an open run since its last finished round
    "journal",
    METADATA,
    sa.Column("number", _RowNumber, primary_key=True),
    sa.Column("run_id", sa.LargeBinary, nullable=False, index=True),
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),  # JSON
)
envelopes = sa.Table(
    "envelopes",
    METADATA,
    sa.Column("run_id", sa.LargeBinary, primary_key=True),
    sa.Column("key_id", sa.Integer, primary_key=True),
    sa.Column("recipient", sa.String, primary_key=True),
    sa.Column("envelope", sa.LargeBinary, nullable=False),  # opaque to us
)
reports = sa.Table(
    "reports",
    METADATA,
    sa.Column("run_id", sa.LargeBinary, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("agent_id", sa.String, primary_key=True),
    sa.Column("progress", sa.Float),  # of local training, 0..1
    sa.Column("training_loss", sa.Float),
    sa.Column("training_seconds", sa.Float),
    sa.Column("sent_bytes", sa.BigInteger),
    sa.Column("received_bytes", sa.BigInteger),
    sa.Column("state_sha256", sa.LargeBinary),
    sa.Column("evaluated", sa.BigInteger),
    sa.Column("correct", sa.BigInteger),
    sa.Column("evaluation_loss", sa.Float),
    sa.Column("saturated", sa.BigInteger),
    sa.Column("saturated_share", sa.Float),  # of all values in the sum
    sa.Column("refusal", sa.Integer),
)
audit = sa.Table(  # who did what: `coordinator.audit`
    "audit",
    METADATA,
    # Never made by the database: two processes that append at once must not both succeed.
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # 1, 2, 3, ...
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970, to the millisecond
    sa.Column("actor", sa.String, nullable=False),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("facts", sa.String, nullable=False),  # JSON object, as it was hashed
    sa.Column("previous_sha256", sa.LargeBinary, nullable=False),  # 32 zeros in the first
    sa.Column("sha256", sa.LargeBinary, nullable=False),
)
