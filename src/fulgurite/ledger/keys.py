"""API keys: made, found, revoked, replaced. A secret is shown once and kept as its hash."""

import hashlib
import hmac
import secrets
import time
from typing import Any

from sqlalchemy import Engine, Row, insert, select, update

from fulgurite.errors import LedgerError, UnknownKeyError
from fulgurite.ledger.tables import keys
from fulgurite.records import UNLIMITED, Key, Limits, now

SHOWN = 11  # a secret's first characters that are kept: "fg-" and 8 of its 43 random ones
REMEMBERED_SECONDS = 1.0  # for so long, at most, a server lets a key in that another process has revoked
FROM_ENVIRONMENT = "environment"  # the id of the key that FULGURITE_API_KEY holds


def hashed(secret: str) -> str:
    # A secret is 256 random bits: one round of SHA-256 is enough, unlike for a password.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class Keys:
    """The keys of one ledger. Safe to use from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reading=True)
        self._remembered: dict[str, tuple[Key, float]] = {}

    def create(self, name: str, limits: Limits = UNLIMITED, admin: bool = False) -> tuple[Key, str]:
        """A new key, and its secret, which nobody can read again."""
        secret = "fg-" + secrets.token_urlsafe(32)
        key = Key("key_" + secrets.token_hex(8), name, secret[:SHOWN], admin, limits, 0, now(), None)
        with self._engine.begin() as connection:
            connection.execute(insert(keys).values(hash=hashed(secret), **as_row(key)))
        return key, secret

    def all(self) -> list[Key]:
        """Every key there ever was, oldest first."""
        with self._reading.begin() as connection:
            return [as_key(row) for row in connection.execute(select(keys).order_by(keys.c.created_at, keys.c.id))]

    def revoke(self, key_id: str) -> Key:
        """Ends a key for good. Raises UnknownKeyError where none of this id is in use."""
        return self._change(key_id, revoked_at=now())

    def rotate(self, key_id: str) -> tuple[Key, str]:
        """Gives a key another secret: the old one opens nothing any more, limits and spending stay."""
        secret = "fg-" + secrets.token_urlsafe(32)
        return self._change(key_id, hash=hashed(secret), prefix=secret[:SHOWN]), secret

    def _change(self, key_id: str, **values: Any) -> Key:
        with self._engine.begin() as connection:
            changed = keys.c.id == key_id, keys.c.revoked_at.is_(None)
            row = connection.execute(update(keys).where(*changed).values(**values).returning(*keys.c)).one_or_none()
            if row is None:
                revoked = connection.execute(select(keys.c.id).where(keys.c.id == key_id)).first() is not None
                raise UnknownKeyError(key_id, revoked)
        self._remembered.clear()
        return as_key(row)

    def set_from_environment(self, secret: str | None) -> None:
        """Lets the operator's own secret in as a key named "environment", and no earlier one of that name.

        Raises LedgerError where it is another key's, for it would come back when that one is given a new secret.
        """
        key = Key(FROM_ENVIRONMENT, FROM_ENVIRONMENT, "", False, UNLIMITED, 0, now(), None)
        with self._engine.begin() as connection:
            known = connection.execute(select(keys.c.id).where(keys.c.id == FROM_ENVIRONMENT)).first()
            same = keys.c.hash == hashed(secret or ""), keys.c.id != FROM_ENVIRONMENT
            other = connection.execute(select(keys).where(*same)).one_or_none()
            if other:
                found = f"FULGURITE_API_KEY is the secret of the key {other.id} ({as_key(other).state()})"
                raise LedgerError(f"{found}: unset it, or set a secret of its own.")
            if secret is None:
                unset = update(keys).where(keys.c.id == FROM_ENVIRONMENT, keys.c.revoked_at.is_(None))
                connection.execute(unset.values(revoked_at=now()))
            elif known:
                this = update(keys).where(keys.c.id == FROM_ENVIRONMENT)
                connection.execute(this.values(hash=hashed(secret), revoked_at=None))
            else:
                connection.execute(insert(keys).values(hash=hashed(secret), **as_row(key)))
        self._remembered.clear()

    def remembered(self, secret: str) -> Key | None:
        """The secret's key where it was found a moment ago: answers at once, so an event loop may ask."""
        key, until = self._remembered.get(hashed(secret), (None, 0.0))
        return key if time.monotonic() < until else None

    def find(self, secret: str) -> Key | None:
        """The key that a secret opens, in whatever state; None where there is none."""
        digest = hashed(secret)
        with self._reading.begin() as connection:
            row = connection.execute(select(keys).where(keys.c.hash == digest)).one_or_none()
        if row is None or not hmac.compare_digest(row.hash, digest):
            return None
        key = as_key(row)
        if key.limits.credit is None:  # else what it has spent must be fresh
            self._remembered[digest] = key, time.monotonic() + REMEMBERED_SECONDS
        return key


def as_row(key: Key) -> dict[str, Any]:
    limits = vars(key.limits) | {"models": None if key.limits.models is None else list(key.limits.models)}
    return {name: value for name, value in vars(key).items() if name != "limits"} | limits


def as_key(row: Row[Any]) -> Key:
    models = None if row.models is None else tuple(row.models)
    limits = Limits(row.expires_at, models, row.requests_per_minute, row.pictures_in_flight, row.credit)
    return Key(row.id, row.name, row.prefix, row.admin, limits, row.spent, row.created_at, row.revoked_at)
