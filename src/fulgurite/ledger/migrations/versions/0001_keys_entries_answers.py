"""Keys, entries and answers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("prefix", sa.String(20), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("admin", sa.Boolean, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("models", sa.JSON),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("pictures_in_flight", sa.Integer),
        sa.Column("credit", sa.BigInteger),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger),
    )
    op.create_table(
        "entries",
        sa.Column("request_id", sa.String(40), primary_key=True),
        sa.Column("key_id", sa.String(40), sa.ForeignKey("keys.id"), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("steps_asked", sa.Integer, nullable=False),
        sa.Column("steps_run", sa.Integer, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("seed", sa.String(20), nullable=False),
        sa.Column("seconds_queued", sa.Double, nullable=False),
        sa.Column("seconds_computed", sa.Double, nullable=False),
        sa.Column("price", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String(10), nullable=False),
    )
    op.create_index("ix_entries_key_id_at", "entries", ["key_id", "at"])
    op.create_index("ix_entries_at", "entries", ["at"])
    op.create_table(
        "answers",
        sa.Column("key_id", sa.String(40), sa.ForeignKey("keys.id"), primary_key=True),
        sa.Column("id", sa.String(80), primary_key=True),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("media_type", sa.String(80), nullable=False),
        sa.Column("headers", sa.JSON, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("key_id", "idempotency_key"),
    )
    op.create_index("ix_answers_expires_at", "answers", ["expires_at"])
