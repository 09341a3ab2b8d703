"""Keys and usage: for their owners, and for the operator's admin keys."""

import asyncio
from datetime import date, datetime
from typing import Annotated, Any, Self

from fastapi import FastAPI, Path, Query
from fastapi import Request as HTTPRequest
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from fulgurite.records import MOST_ALLOWED, Key, Limits, Usage, days, now
from fulgurite.server.body import read_body
from fulgurite.server.pictures import BEARER
from fulgurite.server.problems import Problem, error_responses
from fulgurite.server.service import Service

LAST_YEAR = 3000  # which every system's calendar reaches, in any time zone
NO_NUL = r"^[^\x00]*$"  # which PostgreSQL's texts cannot hold
KeyId = Annotated[str, Path(pattern=NO_NUL)]


class Text(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def expiry(moment: datetime) -> datetime:
    if moment.year >= LAST_YEAR:
        raise ValueError(f"before the year {LAST_YEAR}; leave it out for a key that does not expire")
    if moment <= now():
        raise ValueError("that is past: the key would have expired already")
    return moment


class NewKey(Text):
    """A key to be made; what is left out is not limited."""

    model_config = ConfigDict(strict=True)

    name: str = Field(min_length=1, max_length=200, pattern=NO_NUL, description="For people: whose key it is.")
    admin: bool = Field(False, description="It may manage keys, and see everyone's usage.")
    expires_at: Annotated[AwareDatetime, AfterValidator(expiry)] | None = None
    models: tuple[str, ...] | None = Field(None, max_length=100)
    requests_per_minute: int | None = Field(None, ge=1, le=MOST_ALLOWED)
    pictures_in_flight: int | None = Field(None, ge=1, le=MOST_ALLOWED)
    credit_microdollars: int | None = Field(None, ge=0, le=10**15)


class UsageAsked(Text):
    """What usage is asked for."""

    since: date | None = Field(None, description="The first day (UTC); else 30 days ago.")
    until: date | None = Field(None, description="The last day; else today.")
    key: str | None = Field(None, max_length=40, pattern=NO_NUL, description="One key's; else all that may be seen.")


class KeyShown(Text):
    """A key, without its secret."""

    id: str
    name: str
    prefix: str
    state: str
    admin: bool
    created_at: datetime
    expires_at: datetime | None
    models: tuple[str, ...] | None
    requests_per_minute: int | None
    pictures_in_flight: int | None
    credit_microdollars: int | None
    spent_microdollars: int

    @classmethod
    def of(cls, key: Key, **more: str) -> Self:
        shown: dict[str, Any] = vars(key) | vars(key.limits) | more
        shown |= {"state": key.state(), "credit_microdollars": key.limits.credit, "spent_microdollars": key.spent}
        return cls(**{name: shown[name] for name in cls.model_fields})


class KeyMade(KeyShown):
    """A key, and its secret, which is shown this once."""

    secret: str


class UsageShown(Text):
    """What one key did with one model on one day (UTC)."""

    day: date
    model: str
    key: str
    pictures: int
    not_made: int = Field(description="Failed, refused or cancelled: they cost nothing.")
    steps: int
    price_microdollars: int

    @classmethod
    def of(cls, row: Usage) -> "UsageShown":
        return cls(
            day=row.day,
            model=row.model,
            key=row.key_id,
            pictures=row.pictures,
            not_made=row.not_made,
            steps=row.steps,
            price_microdollars=row.price,
        )


def add_accounts(app: FastAPI, service: Service) -> None:
    keys, new_key = service.ledger.keys, NewKey.model_json_schema()

    @app.get("/api/v1/usage", responses=error_responses(401, 403, 422, 503), dependencies=[BEARER])
    async def usage(http: HTTPRequest, asked: Annotated[UsageAsked, Query()]) -> dict[str, list[UsageShown]]:
        """What was made and what it cost, by day, model and key: your own, and everyone's with an admin key."""
        caller = await service.caller(http)
        if not caller.admin and asked.key not in (None, caller.id):
            raise Problem(403, "not_an_admin", "This key sees its own usage only.", "key")
        last = asked.until or now().date()
        if asked.since and asked.since > last:
            message = f"since: {asked.since} is after the last day, {last}."
            raise Problem(422, "invalid_parameter", message, "since")
        whose = asked.key if caller.admin else caller.id
        first, end = days(asked.since, asked.until)
        rows = await asyncio.to_thread(service.ledger.usage, first, end, whose)
        return {"usage": [UsageShown.of(row) for row in rows]}

    @app.get("/api/v1/admin/keys", responses=error_responses(401, 403, 503), dependencies=[BEARER])
    async def list_keys(http: HTTPRequest) -> dict[str, list[KeyShown]]:
        """Every key there ever was, oldest first."""
        await service.admin(http)
        return {"keys": [KeyShown.of(key) for key in await asyncio.to_thread(keys.all)]}

    @app.post(
        "/api/v1/admin/keys",
        status_code=201,
        responses=error_responses(400, 401, 403, 404, 408, 413, 415, 422, 503),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": new_key}}}},
        dependencies=[BEARER],
    )
    async def create_key(http: HTTPRequest) -> KeyMade:
        """A new key. Its secret is shown this once."""
        await service.admin(http)  # before a byte of the body is read
        new = await read_body(http, service.settings.max_body_bytes, NewKey)
        for model in new.models or ():
            service.check_served(model)
        limits = Limits(
            new.expires_at, new.models, new.requests_per_minute, new.pictures_in_flight, new.credit_microdollars
        )
        key, secret = await asyncio.to_thread(keys.create, new.name, limits, new.admin)
        return KeyMade.of(key, secret=secret)

    @app.delete(
        "/api/v1/admin/keys/{key_id}", responses=error_responses(401, 403, 404, 422, 503), dependencies=[BEARER]
    )
    async def revoke_key(http: HTTPRequest, key_id: KeyId) -> KeyShown:
        """Ends a key for good; within a second every server refuses it."""
        await service.admin(http)
        return KeyShown.of(await asyncio.to_thread(keys.revoke, key_id))

    @app.post(
        "/api/v1/admin/keys/{key_id}/rotate", responses=error_responses(401, 403, 404, 422, 503), dependencies=[BEARER]
    )
    async def rotate_key(http: HTTPRequest, key_id: KeyId) -> KeyMade:
        """Gives a key another secret, shown this once; limits and spending stay."""
        await service.admin(http)
        key, secret = await asyncio.to_thread(keys.rotate, key_id)
        return KeyMade.of(key, secret=secret)
