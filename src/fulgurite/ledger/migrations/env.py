"""Run by Alembic, over the connection and within the transaction of ``fulgurite.ledger.database.migrate``."""

from alembic import context

from fulgurite.ledger.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
