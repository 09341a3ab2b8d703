"""What every part of the server needs: who asks, which models there are, and the pictures on their way."""

import asyncio
import hashlib
import json
import re

from fastapi import Request as HTTPRequest

from fulgurite.cards import Card, card, cards
from fulgurite.errors import FulguriteError, UnknownModelError
from fulgurite.records import Key
from fulgurite.request import Request, plan
from fulgurite.server.body import Body, PictureBody, read_body
from fulgurite.server.jobs import Jobs, Order
from fulgurite.server.metrics import Metrics
from fulgurite.server.problems import Problem
from fulgurite.server.protocol import Engine, Ledger
from fulgurite.server.webhooks import Webhooks, check_secret
from fulgurite.settings import Settings, model_and_steps

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def served(settings: Settings) -> list[str]:
    """The ids of the models that are served."""
    return list(settings.models or cards())


def check_settings(settings: Settings) -> None:
    """What is not there is an error now, not at the first request. Raises FulguriteError."""
    for name in served(settings):
        card_for("models", name, settings)
    for name in settings.fast_decoder:
        if "fast" not in card_for("fast_decoder", name, settings).decoders:
            raise FulguriteError(f"{settings.origin('fast_decoder')}: {name} has no fast decoder.")
    for name, _ in map(model_and_steps, settings.warm):
        if name not in served(settings):
            raise FulguriteError(f"{settings.origin('warm')}: {name!r} is not among the models served.")
    check_secret(settings)


def demo_notices(settings: Settings) -> list[str]:
    """Of each served model that another answers for."""
    others = [(model, settings.drawn_by(model)) for model in served(settings)]
    return [demo_notice(model, drawn_by) for model, drawn_by in others if drawn_by != model]


def demo_notice(model: str, drawn_by: str) -> str:
    return f"Demo: {drawn_by}, a much smaller model, answers for {model}."


class Service:
    """The server without its addresses."""

    def __init__(self, engine: Engine, ledger: Ledger, settings: Settings) -> None:
        self.engine, self.ledger, self.settings = engine, ledger, settings
        check_settings(settings)
        self.served = served(settings)
        self.metrics = Metrics(engine)
        self.webhooks = Webhooks(settings)
        self.jobs = Jobs(engine, ledger, settings.keep_seconds, self.metrics)

    def check_served(self, model: str) -> None:
        """Raises UnknownModelError."""
        if model not in self.served:
            raise UnknownModelError(model, self.served)

    def price(self, model: str) -> int:
        """What a picture costs, in micro-dollars: by the card of the model that draws it."""
        return card(self.settings.drawn_by(model)).cost_microdollars

    async def caller(self, http: HTTPRequest) -> Key:
        """The key that a request carries. Raises Problem (401)."""
        scheme, _, secret = http.headers.get("authorization", "").partition(" ")
        # Starlette reads headers as Latin-1: back to the bytes that were sent.
        secret = secret.strip().encode("latin-1").decode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not secret:
            raise unauthorized("Send your key as the header Authorization: Bearer KEY.")
        keys = self.ledger.keys
        key = keys.remembered(secret) or await asyncio.to_thread(keys.find, secret)
        if key is None:
            raise unauthorized("There is no such key. Send yours as the header Authorization: Bearer KEY.")
        http.state.key = key.id
        if key.state() != "active":
            raise unauthorized(f"This key is {key.state()}. Ask the operator for another.")
        return key

    async def admin(self, http: HTTPRequest) -> Key:
        """The key that a request carries, if it may manage others. Raises Problem (401 or 403)."""
        key = await self.caller(http)
        if not key.admin:
            raise Problem(403, "not_an_admin", "This key may not do that: it needs one made with --admin.")
        return key

    async def order(self, http: HTTPRequest) -> Order:
        """Authenticates a request, counts it against the key's limits, checks its body, and returns the order.

        Raises Problem, RequestError or UnknownModelError.
        """
        return (await self.order_as(http, PictureBody))[0]

    async def order_as(self, http: HTTPRequest, kind: type[Body]) -> tuple[Order, Body]:
        """As ``order``, with a body of this kind, which is returned too."""
        key = await self.admitted(http)
        body = await read_body(http, self.settings.max_body_bytes, kind)
        return self.order_of(http, key, body), body

    async def admitted(self, http: HTTPRequest) -> Key:
        """The key that a request for pictures carries, the request counted. Raises Problem (401 or 429)."""
        key = await self.caller(http)
        http.state.headers = self.jobs.meters.count_request(key)
        return key

    def order_of(self, http: HTTPRequest, key: Key, body: PictureBody) -> Order:
        """What a key asks for by a body. Raises Problem, RequestError or UnknownModelError."""
        self.check_served(body.model)
        http.state.model = body.model
        if key.limits.models is not None and body.model not in key.limits.models:
            may = ", ".join(key.limits.models) or "none"
            raise Problem(403, "model_not_allowed", f"This key may not use {body.model!r}. It may use: {may}.", "model")
        drawn_by = self.settings.drawn_by(body.model)
        asked = body.data.model_dump()
        if "decoder" not in body.data.model_fields_set:
            asked["decoder"] = self.settings.usual_decoder(drawn_by)
        request = Request(**asked)
        plan(card(drawn_by), request)  # what the model cannot do is refused now
        media_type = body.media_type(http.headers.get("accept", ""))
        return Order(
            id=http.state.request_id,
            key=key,
            model=drawn_by,
            request=request,
            media_type=media_type,
            price=self.price(body.model),
            body_hash=body_hash(body, media_type),
            idempotency_key=idempotency_key(http),
            stream=body.stream or "text/event-stream" in http.headers.get("accept", "").lower(),
            headers={"X-Fulgurite-Demo": demo_notice(body.model, drawn_by)} if drawn_by != body.model else {},
        )


def card_for(setting: str, model: str, settings: Settings) -> Card:
    """The card of a model that a setting names. Raises FulguriteError, which says where it was named."""
    try:
        return card(model)
    except UnknownModelError as error:
        raise FulguriteError(f"{settings.origin(setting)}: {error}") from None


def unauthorized(message: str) -> Problem:
    return Problem(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def idempotency_key(http: HTTPRequest) -> str | None:
    """Raises Problem (422)."""
    given = http.headers.get("idempotency-key")
    if given is not None and not IDEMPOTENCY_KEY.fullmatch(given):
        message = "Idempotency-Key: 1 to 255 visible ASCII characters without spaces, such as a UUID."
        raise Problem(422, "invalid_parameter", message, "Idempotency-Key")
    return given


def body_hash(body: PictureBody, media_type: str) -> str:
    """Of what was asked, whatever the order and the spaces of its JSON; a seed left out is not the one drawn for it."""
    asked = body.model_dump(exclude_unset=True, exclude={"stream", "webhook"}) | {"output_format": media_type}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
