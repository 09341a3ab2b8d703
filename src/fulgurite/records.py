"""What the server and the ledger tell each other: plain records. Money is in whole micro-dollars ($0.000001)."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal

USUAL_DAYS = 30
MOST_ALLOWED = 1_000_000  # requests a minute, and pictures at once, where a key is limited in them
Outcome = Literal["done", "failed", "refused", "cancelled"]


def now() -> datetime:
    return datetime.now(UTC)


def days(since: date | None, until: date | None) -> tuple[datetime, datetime]:
    """The first moment of the first day, and the first moment after the last, UTC; as it is, the last 30 days."""
    last = min(until or now().date(), date.max - timedelta(days=1))
    first = since or last - timedelta(days=min(USUAL_DAYS, last.toordinal() - 1))
    midnight = datetime.min.time()
    return datetime.combine(first, midnight, UTC), datetime.combine(last, midnight, UTC) + timedelta(days=1)


def dollars(micro: int) -> str:
    """Micro-dollars as dollars, exactly: 1100 is "0.0011"."""
    return f"{micro // 1_000_000}.{micro % 1_000_000:06d}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Limits:
    """What a key may do; None everywhere: anything, for ever."""

    expires_at: datetime | None = None
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    pictures_in_flight: int | None = None  # at once
    credit: int | None = None  # micro-dollars that it may spend in all


UNLIMITED = Limits()


@dataclass(frozen=True)
class Key:
    """An API key, without the secret: that was shown once."""

    id: str
    name: str
    prefix: str  # the secret's first characters, by which people tell keys apart
    admin: bool  # may manage keys, and see everyone's usage
    limits: Limits
    spent: int  # micro-dollars: the sum of the prices in this key's entries
    created_at: datetime
    revoked_at: datetime | None

    def state(self) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at:
            return "revoked"
        expires = self.limits.expires_at
        return "expired" if expires and expires <= now() else "active"


@dataclass(frozen=True)
class Entry:
    """One picture at its end, whatever that was. Only a picture that was made has a price."""

    request_id: str
    key_id: str
    at: datetime
    model: str  # the one that drew it
    steps_asked: int
    steps_run: int
    width: int  # pixels
    height: int
    seed: int
    seconds_queued: float
    seconds_computed: float
    price: int  # micro-dollars
    outcome: Outcome


@dataclass(frozen=True)
class Answer:
    """What a request was answered, kept until it expires so that a retry gets it again."""

    id: str
    key_id: str
    idempotency_key: str | None
    body_hash: str  # SHA-256 of what was asked
    media_type: str
    headers: Mapping[str, str]
    content: bytes
    expires_at: datetime


@dataclass(frozen=True)
class Usage:
    """What one key did with one model on one day (UTC)."""

    day: date
    model: str
    key_id: str
    pictures: int
    not_made: int  # failed, refused or cancelled: they cost nothing
    steps: int
    price: int  # micro-dollars
