"""Rounds remember the quality that their sums opened to."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add what older rounds have no value for."""
    op.add_column("rounds", sa.Column("quality", sa.String))
    op.add_column("rounds", sa.Column("training_loss", sa.Float))
