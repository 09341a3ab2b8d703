"""``POST /api/v1``: the hosted API's one request, picture bytes back."""

import asyncio
from typing import Any

from fastapi import FastAPI, Security
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from fastapi.security import HTTPBearer

from fulgurite.picture_file import FORMATS
from fulgurite.records import Answer
from fulgurite.server import streaming
from fulgurite.server.body import PictureBody, body_schema
from fulgurite.server.headers import LIMITS, PICTURE
from fulgurite.server.jobs import Job, Jobs, client_gone
from fulgurite.server.problems import error_responses
from fulgurite.server.service import Service

BEARER = Security(HTTPBearer(scheme_name="bearer", auto_error=False))  # for OpenAPI: the service checks the key
IDEMPOTENCY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "description": "A retry with the same key and the same request gets the first answer, and is not billed again.",
}


def request_body(kind: type[PictureBody] = PictureBody) -> dict[str, Any]:
    """The body and its headers for OpenAPI: the handlers read it themselves, within a bound."""
    return {
        "parameters": [IDEMPOTENCY_HEADER],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body_schema(kind)}}},
    }


def add_pictures(app: FastAPI, service: Service) -> None:
    text = {"type": "string"}
    binary = {"schema": text | {"format": "binary"}}

    @app.post(
        "/api/v1",
        response_class=Response,
        responses={
            200: {
                "description": "The picture; or a stream of events, the last of which has it.",
                "content": {kind: binary for kind in FORMATS.values()} | {streaming.MEDIA_TYPE: {"schema": text}},
                "headers": PICTURE | LIMITS,
            },
            **error_responses(400, 401, 402, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra=request_body(),
        dependencies=[BEARER],
        summary="Draw a picture",
    )
    async def draw(http: HTTPRequest) -> Response:
        """Draws one picture.

        With `stream`, or `Accept: text/event-stream`, the answer is server-sent events, each with JSON as its data:

        * `queued`: `id`; `position`, the pictures before it; `seconds`, about how long it waits.
        * `step`, after each: `step`, of so many `steps`; `preview`, a small JPEG as a data URL, or null.
        * `done`, the last: `picture` as a data URL, and the values of the `X-Fulgurite-...` headers under their
          lower-case names without that prefix (`seed`, `steps`, `model`, ...).
        * `error`, the last instead: `status`, `error` (as elsewhere), `retry_after` (seconds or null), `request_id`.

        What is wrong before the picture is queued is told as without `stream`, by the answer's status.
        """
        order = await service.order(http)
        job = service.jobs.start(order)
        if order.stream:
            return await streaming.streamed(http, service.jobs, job, streaming.OwnDialect(), {})
        answer = await awaited(http, service.jobs, job)
        return Response(answer.content, media_type=answer.media_type, headers=dict(answer.headers))


async def awaited(http: HTTPRequest, jobs: Jobs, job: Job) -> Answer:
    """The job's answer. A client that goes away waits no longer, and a job that nobody waits for is cancelled."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    with jobs.waiting(job) as answer:
        gone: asyncio.Task[Any] = asyncio.create_task(disconnected())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not answer.done():
            raise client_gone()
        return answer.result()
