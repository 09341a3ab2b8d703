"""``/api/v1/predictions``: pictures that are asked for now and fetched later, as Replicate's API has them.

A prediction is a picture under an idempotency key of its own, so that asking again for the same one joins it or gets
its answer. What succeeded is in the ledger and outlives this process; what runs, failed or was cancelled is here.
"""

import asyncio
import logging
import re
import traceback
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Path
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from fulgurite.errors import FulguriteError
from fulgurite.picture_file import FORMATS
from fulgurite.records import Answer, Key
from fulgurite.server.body import PredictionBody
from fulgurite.server.headers import LIMITS, PICTURE
from fulgurite.server.jobs import KEY_REUSED, Job, Order, made
from fulgurite.server.pictures import BEARER, IDEMPOTENCY_HEADER, request_body
from fulgurite.server.problems import Problem, error_responses, logged, problem
from fulgurite.server.service import Service
from fulgurite.server.webhooks import DELAYS, TIMEOUT

log = logging.getLogger("fulgurite")
MOST_KEPT = 10_000  # predictions that failed or were cancelled, past which the oldest are forgotten
ID_PATTERN = "^[A-Za-z0-9_-]{8,64}$"
NewId = Annotated[str, Path(pattern=ID_PATTERN, description="8 to 64 letters, digits, - and _.")]
PREFER_HEADER = {
    "name": "Prefer",
    "in": "header",
    "schema": {"type": "string"},
    "description": "respond-async: the answer comes at once, and the picture is made afterwards.",
}


class PredictionShown(BaseModel):
    id: str
    status: Literal["starting", "processing", "succeeded", "failed", "canceled"]
    urls: dict[str, str]  # get and cancel
    output: str | None  # where the picture is, once it is made
    made: dict[str, str] | None  # how it was made: model, steps, seed, seconds, price in dollars
    error: dict[str, str | None] | None  # code, message and param, if it failed


@dataclass(eq=False)
class Prediction:
    """One that is not known to have succeeded."""

    job: Job | None  # while it is being made
    answer: "asyncio.Task[Answer]"
    cancelled: bool = False
    webhooks: set[str] = field(default_factory=set)  # that are told of its end

    def found(self) -> "Prediction | Answer":
        """What there is of it: the answer once it succeeded, else itself. Raises nothing."""
        done = self.answer.done() and not self.answer.cancelled() and self.answer.exception() is None
        return self.answer.result() if done else self

    def status(self) -> Literal["starting", "processing", "failed", "canceled"]:
        if self.answer.done():
            return "canceled" if self.cancelled else "failed"
        return "processing" if self.job and self.job.future and self.job.future.running() else "starting"


class Predictions:
    """Those of this process, by key and id."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[tuple[str, str], Prediction] = {}

    async def begin(self, http: HTTPRequest, id: str | None = None) -> tuple[str, Prediction | Answer]:
        """Starts the picture under this id, joins it if it is being made, or returns its answer.

        Raises as Service.order does, and Problem (409).
        """
        order, body = await self._service.order_as(http, PredictionBody)
        if order.stream:
            message = "A prediction is not streamed: ask for its status, or send the request to /api/v1."
            raise Problem(422, "invalid_parameter", message, "stream")
        if body.webhook is not None:
            await self._service.webhooks.check(body.webhook)
        own, id = id, id or derived_id(order.key, order.idempotency_key)
        order = replace(order, idempotency_key=reserved_key(id))
        try:
            if earlier := await self._service.jobs.earlier(order):
                return id, earlier
            prediction = self._started((order.key.id, id), order)
        except Problem as error:
            if own is None or error.code != KEY_REUSED:
                raise
            message = "There is a prediction of this id already, of another request. Use a new id for each picture."
            raise Problem(409, KEY_REUSED, message, "id") from None
        if body.webhook is not None and body.webhook not in prediction.webhooks:
            prediction.webhooks.add(body.webhook)
            told = partial(told_at_end, str(http.base_url), id, prediction)
            self._service.webhooks.send(body.webhook, order.key.id, id, told)
        return id, prediction

    def _started(self, name: tuple[str, str], order: Order) -> Prediction:
        jobs, prediction = self._service.jobs, self._known.get(name)
        job = jobs.start(order)
        if prediction is None or prediction.job is not job:
            self._known.pop(name, None)  # an earlier try, which failed
            while len(self._known) >= MOST_KEPT and self._forget_one():
                pass
            # Waited for by the server itself, so that the work goes on when the client is gone.
            prediction = self._known[name] = Prediction(job, asyncio.create_task(jobs.wait(job)))
            prediction.answer.add_done_callback(partial(self._ended, name, prediction))
        return prediction

    async def find(self, key: Key, id: str) -> Prediction | Answer:
        """What there is under this id. Raises Problem (404)."""
        if prediction := self._known.get((key.id, id)):
            return prediction.found()
        answer = None
        if re.fullmatch(ID_PATTERN, id):
            answer = await asyncio.to_thread(self._service.ledger.answer, key.id, reserved_key(id))
        if answer is None:
            raise Problem(404, "unknown_prediction", "There is no such prediction, or it is kept no longer.", "id")
        return answer

    def cancel(self, prediction: Prediction) -> None:
        if prediction.job and not prediction.answer.done():
            prediction.cancelled = True
            self._service.jobs.abandon(prediction.job)

    def _ended(self, name: tuple[str, str], prediction: Prediction, task: "asyncio.Task[Answer]") -> None:
        job, prediction.job = prediction.job, None
        if task.cancelled():
            return
        if error := task.exception():
            logged(error, job.order.id if job else "")
            # Kept for its words alone: its frames, as its job, may hold long prompts and what the device had of it.
            forget_frames(error)
        elif self._known.get(name) is prediction:
            del self._known[name]  # the ledger has it

    def _forget_one(self) -> bool:
        name = next((name for name, prediction in self._known.items() if prediction.answer.done()), None)
        return name is not None and self._known.pop(name) is not None


def reserved_key(id: str) -> str:
    """An idempotency key that no client can send, since it has a space."""
    return f"prediction {id}"


def forget_frames(error: BaseException | None) -> None:
    """Of the error and of those that it came of."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def derived_id(key: Key, idempotency_key: str | None) -> str:
    """A new id; or always the same for the same idempotency key, so that a retry finds what it began."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{key.id} {idempotency_key}").hex if idempotency_key else uuid.uuid4().hex


def error_of(prediction: Prediction) -> dict[str, str | None] | None:
    if not prediction.answer.done():
        return None
    error = None if prediction.answer.cancelled() else prediction.answer.exception()
    if not isinstance(error, Exception):
        return None
    found = problem(error)
    return {"code": found.code, "message": found.message, "param": found.param}


def shown(base_url: str, id: str, found: Prediction | Answer) -> PredictionShown:
    here = f"{base_url.rstrip('/')}/api/v1/predictions/{id}"
    urls = {"get": here, "cancel": f"{here}/cancel"}
    if isinstance(found, Answer):
        return PredictionShown(
            id=id, status="succeeded", urls=urls, output=f"{here}/output", made=made(found), error=None
        )
    status = found.status()
    error = error_of(found) if status == "failed" else None
    return PredictionShown(id=id, status=status, urls=urls, output=None, made=None, error=error)


async def told_at_end(base_url: str, id: str, prediction: Prediction) -> tuple[str, bytes]:
    """What a webhook says, and its id."""
    await asyncio.wait({prediction.answer})
    found = shown(base_url, id, prediction.found())
    return f"{id}-{found.status}", found.model_dump_json().encode()


def describe_webhook(app: FastAPI) -> None:
    """For OpenAPI: the request that a receiver gets."""
    delays = ", ".join(f"{delay:g}" for delay in DELAYS[1:])

    @app.webhooks.post(
        "prediction",
        status_code=204,
        response_description="It has arrived, as any other 2XX says too.",
        responses={"default": {"description": "It is sent again."}},
        description=(
            "A prediction at its end, sent to the `webhook` it was asked for with, and signed as Standard Webhooks "
            "has it: GET /api/v1/webhook-secret gives the secret. Where no 2XX comes within "
            f"{TIMEOUT:g} s, it is sent again, with the same `webhook-id`: {delays} s after the try before."
        ),
    )
    async def prediction_ended(
        body: PredictionShown,
        webhook_id: Annotated[str, Header(description="The same at every try.")],
        webhook_timestamp: Annotated[int, Header(description="Of this try, in seconds since 1970.")],
        webhook_signature: Annotated[
            str, Header(description="v1, and in base64 the HMAC-SHA256 of webhook-id.webhook-timestamp.body.")
        ],
    ) -> None: ...


def add_predictions(app: FastAPI, service: Service) -> None:
    predictions = Predictions(service)
    describe_webhook(app)
    refusals = error_responses(400, 401, 402, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503)
    asked: dict[str, Any] = request_body(PredictionBody)
    described: dict[int | str, dict[str, Any]] = {
        201: {"description": "The picture is made.", "model": PredictionShown, "headers": LIMITS},
        202: {"description": "Accepted; not finished yet.", "model": PredictionShown, "headers": LIMITS},
        **refusals,
    }

    async def begun(http: HTTPRequest, id: str | None) -> JSONResponse:
        id, found = await predictions.begin(http, id)
        if isinstance(found, Prediction) and "respond-async" not in http.headers.get("prefer", "").lower():
            await asyncio.wait({found.answer})  # which a client that goes away does not stop
            found = found.found() if found.cancelled else found.answer.result()
        status = 201 if isinstance(found, Answer) else 202
        return JSONResponse(shown(str(http.base_url), id, found).model_dump(), status)

    @app.post(
        "/api/v1/predictions",
        status_code=201,
        response_model=PredictionShown,
        responses=described,
        openapi_extra={**asked, "parameters": [IDEMPOTENCY_HEADER, PREFER_HEADER]},
        dependencies=[BEARER],
        summary="Create a prediction",
    )
    async def create(http: HTTPRequest) -> JSONResponse:
        """Creates a prediction. With ``Prefer: respond-async`` the answer is 202 at once; else 201 when it is made."""
        return await begun(http, None)

    @app.put(
        "/api/v1/predictions/{id}",
        status_code=201,
        response_model=PredictionShown,
        responses=described,
        openapi_extra={**asked, "parameters": [PREFER_HEADER]},
        dependencies=[BEARER],
        summary="Create a prediction under your own id",
    )
    async def put(http: HTTPRequest, id: NewId) -> JSONResponse:
        """Creates a prediction under an id of your own.

        Sending it again returns the same prediction: one picture, billed once.
        """
        return await begun(http, id)

    @app.get(
        "/api/v1/predictions/{id}",
        responses=error_responses(401, 404, 422, 503),
        dependencies=[BEARER],
        summary="Get a prediction",
    )
    async def get(http: HTTPRequest, id: str) -> PredictionShown:
        """A prediction's status, and its picture's URL once it has succeeded."""
        return shown(str(http.base_url), id, await predictions.find(await service.caller(http), id))

    @app.get(
        "/api/v1/predictions/{id}/output",
        response_class=Response,
        responses={
            200: {
                "description": "The picture.",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
                "headers": PICTURE,
            },
            **error_responses(401, 404, 409, 422, 503),
        },
        dependencies=[BEARER],
        summary="Get a prediction's picture",
    )
    async def output(http: HTTPRequest, id: str) -> Response:
        """The picture's bytes, with the headers that ``POST /api/v1`` gives."""
        found = await predictions.find(await service.caller(http), id)
        if isinstance(found, Prediction):
            raise Problem(409, "no_output", f"There is no picture: this prediction is {found.status()}.", "id")
        return Response(found.content, media_type=found.media_type, headers=dict(found.headers))

    @app.post(
        "/api/v1/predictions/{id}/cancel",
        responses=error_responses(401, 404, 422, 503),
        dependencies=[BEARER],
        summary="Cancel a prediction",
    )
    async def cancel(http: HTTPRequest, id: str) -> PredictionShown:
        """Cancels a prediction that is not finished. A picture that was not made is not billed."""
        found = await predictions.find(await service.caller(http), id)
        if isinstance(found, Prediction):
            predictions.cancel(found)
            await asyncio.wait({found.answer})
            found = await predictions.find(await service.caller(http), id)
        return shown(str(http.base_url), id, found)

    @app.get("/api/v1/webhook-secret", responses=error_responses(401, 503), dependencies=[BEARER])
    async def webhook_secret(http: HTTPRequest) -> dict[str, str]:
        """What this key's webhooks are signed with (Standard Webhooks, whsec_...)."""
        key = await service.caller(http)
        try:
            return {"secret": await asyncio.to_thread(service.webhooks.secret_of, key.id)}
        except FulguriteError as error:
            log.error("no webhook can be signed: %s", error)
            message = "The server's webhook secret cannot be used, so no webhook is sent. The server's log says why."
            raise Problem(503, "webhook_secret_unusable", message) from None
