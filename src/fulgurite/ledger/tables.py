"""The ledger's tables. A change here needs a migration beside it: a test compares the two."""

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator


class Moment(TypeDecorator[datetime]):
    """A time as whole milliseconds since 1970, UTC: the same number in every database, and divisible into days."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: object) -> int | None:
        return None if value is None else int(value.timestamp() * 1000)

    def process_result_value(self, value: int | None, dialect: object) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value / 1000, UTC)


metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s"})

keys = Table(
    "keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("prefix", String(20), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("admin", Boolean, nullable=False),
    Column("expires_at", Moment),
    Column("models", JSON(none_as_null=True)),
    Column("requests_per_minute", Integer),
    Column("pictures_in_flight", Integer),
    Column("credit", BigInteger),
    Column("spent", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("revoked_at", Moment),
)

entries = Table(
    "entries",
    metadata,
    Column("request_id", String(40), primary_key=True),
    Column("key_id", ForeignKey("keys.id"), nullable=False),
    Column("at", Moment, nullable=False),
    Column("model", String(200), nullable=False),
    Column("steps_asked", Integer, nullable=False),
    Column("steps_run", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("seed", String(20), nullable=False),  # to 2**64 - 1: past what 64-bit columns hold, which are signed
    Column("seconds_queued", Double, nullable=False),
    Column("seconds_computed", Double, nullable=False),
    Column("price", BigInteger, nullable=False),
    Column("outcome", String(10), nullable=False),
    Index(None, "key_id", "at"),
    Index(None, "at"),
)

answers = Table(
    "answers",
    metadata,
    Column("key_id", ForeignKey("keys.id"), primary_key=True),
    Column("id", String(80), primary_key=True),
    Column("idempotency_key", String(255)),
    Column("body_hash", String(64), nullable=False),
    Column("media_type", String(80), nullable=False),
    Column("headers", JSON, nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("expires_at", Moment, nullable=False),
    UniqueConstraint("key_id", "idempotency_key"),
    Index(None, "expires_at"),
)
