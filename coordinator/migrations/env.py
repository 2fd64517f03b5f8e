"""What Alembic runs to migrate: on the connection that it is given, in the transaction there."""

from alembic import context

from coordinator.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,  # SQLite changes a column by copying its table
)
context.run_migrations()
