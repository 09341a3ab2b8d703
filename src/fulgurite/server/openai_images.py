"""OpenAI's Images API, for the many programs that speak it: ``base_url="http://127.0.0.1:8000/v1"``."""

import asyncio
import base64
import hashlib
import re
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from fulgurite.cards import card
from fulgurite.errors import RequestError
from fulgurite.parameters import LEAST_SIDE, MOST_SIDE, Parameters, counted_up, whole
from fulgurite.records import Answer
from fulgurite.server.body import PictureBody, read_body
from fulgurite.server.headers import LIMITS, NOTES
from fulgurite.server.jobs import LAST_SECONDS, Order, made, notes_header, so_far
from fulgurite.server.limits import counted
from fulgurite.server.openai_stream import OpenAIDialect
from fulgurite.server.pictures import BEARER, IDEMPOTENCY_HEADER, awaited
from fulgurite.server.problems import Problem, error_responses, logged
from fulgurite.server.service import Service
from fulgurite.server.streaming import MEDIA_TYPE, streamed

STEPS = {"low": 2, "medium": 4}  # the most that are spent; what else quality may be stands for all
UNHEEDED = ("moderation", "safety_identifier", "style", "user")  # what is said in these changes no picture here
# LEAST_SIDE to MOST_SIDE pixels, as OpenAPI can say it.
SIDE = "(25[6-9]|2[6-9][0-9]|[3-9][0-9]{2}|1[0-9]{3}|20[0-3][0-9]|204[0-8])"
SIZE = f"^(auto|{SIDE}x{SIDE})$"


def checked_size(size: str) -> str:
    if not re.fullmatch(SIZE, size):
        raise PydanticCustomError("size", f"It should be WIDTHxHEIGHT, {LEAST_SIDE} to {MOST_SIDE} each, or auto")
    return size


def as_here(schema: dict[str, Any]) -> None:
    """For OpenAPI: what these parameters are where they are left out."""
    several_streamed = {"stream": {"const": True}, "n": {"type": "integer", "minimum": 2}}
    schema["not"] = {
        "anyOf": [
            {"required": ["size", "width"]},
            {"required": ["size", "height"]},
            {"required": ["stream", "n"], "properties": several_streamed},
        ]
    }
    for name, else_it_is in (("width", "size's"), ("height", "size's"), ("num_steps", "quality's")):
        field = schema["properties"][name]
        del field["default"]
        field["description"] += f" Left out: {else_it_is}."


class GenerationBody(Parameters):
    """OpenAI's parameters that can be kept here, and beside them all of the hosted API's."""

    model_config = ConfigDict(json_schema_extra=as_here)

    model: str = Field("bytedance/stable-diffusion-xl-lightning", max_length=200, description="The model's id.")
    n: Annotated[int, Field(ge=1, le=10), BeforeValidator(whole)] | None = Field(
        None, description="How many pictures: 1 unless said. Where there is a seed, theirs count up from it."
    )
    size: Annotated[str, AfterValidator(checked_size), Field(json_schema_extra={"pattern": SIZE})] | None = Field(
        None, description="WIDTHxHEIGHT, instead of width and height; auto: the model's own."
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = Field(
        None, description="low: at most 2 steps, medium: 4, else 20; num_steps says it exactly."
    )
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come as base64; there are no URLs.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="PNG unless said.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    stream: bool | None = Field(None, description="Server-sent events instead of one answer; of one picture only.")
    partial_images: Annotated[int, Field(ge=0, le=3), BeforeValidator(whole)] | None = Field(
        None, description="The most partial images that a stream shows before the picture: none unless said."
    )
    style: str | None = Field(None, max_length=200, description="Changes nothing, which a note says.")
    moderation: str | None = Field(None, max_length=200, description="Changes nothing, which a note says.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Changes nothing, which a note says.")
    user: str | None = Field(None, max_length=1000, description="Changes nothing, which a note says.")

    def pictures(self, usual_size: tuple[int, int]) -> list[PictureBody]:
        """The hosted API's body for each picture. Raises Problem (422)."""
        given = self.model_dump(include=set(Parameters.model_fields), exclude_unset=True)
        if "size" in self.model_fields_set and {"width", "height"} & set(given):
            raise Problem(422, "invalid_parameter", "size: send it, or width and height, not both.", "size")
        if self.stream and (self.n or 1) > 1:
            raise Problem(422, "invalid_parameter", "n: a stream tells of one picture, so send 1, or no stream.", "n")
        width, height = usual_size if self.size in (None, "auto") else map(int, self.size.split("x"))
        asked = {"width": width, "height": height} | given
        if self.quality in STEPS:
            asked = {"num_steps": STEPS[self.quality]} | asked
        bodies = []
        for number in range(self.n or 1):
            seed = {"seed": counted_up(given["seed"], number)} if "seed" in given else {}
            data = Parameters(**asked | seed)
            bodies.append(
                PictureBody(model=self.model, data=data, output_format=self.output_format or "png", stream=False)
            )
        return bodies


class Generated(BaseModel):
    """One picture."""

    b64_json: str = Field(description="The file's bytes in base64.")
    made: dict[str, str] = Field(description="What the headers X-Fulgurite-... of POST /api/v1 say, as in predictions.")


class Generation(BaseModel):
    """The answer, as OpenAI's client reads it."""

    created: int = Field(description="Seconds since 1970.")
    output_format: Literal["png", "jpeg", "webp"]
    size: str = Field(description="WIDTHxHEIGHT.")
    data: list[Generated]


class Listed(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "fulgurite"


class Listing(BaseModel):
    """The models there are."""

    object: Literal["list"] = "list"
    data: list[Listed]


def numbered(order: Order, number: int, of: int) -> Order:
    """The order of one of several pictures of a request: each has its own line in the ledger, and its own retries."""
    body_hash = hashlib.sha256(f"{order.body_hash} {number} of {of}".encode()).hexdigest()
    if not number:
        return replace(order, body_hash=body_hash)
    key = order.idempotency_key
    # No client's own, since it has a space, and no longer than one may be.
    again = f"image {uuid.uuid5(uuid.NAMESPACE_URL, f'{key} {number}').hex}" if key else None
    return replace(order, id=f"{order.id}-{number}", idempotency_key=again, body_hash=body_hash)


async def all_made(http: HTTPRequest, service: Service, orders: list[Order]) -> tuple[list[Answer], list[str]]:
    """The pictures that were made, and why others were not. Where none was, raises the first one's error."""
    for order in orders:  # before any is made
        await service.jobs.refuse_reuse(order)
    with ExitStack() as all_wait:  # for each from its start on: should a later one not start, none is made for nobody
        jobs, tasks = [], []
        for order in orders:
            jobs.append(service.jobs.start(order))
            tasks.append(all_wait.enter_context(service.jobs.waiting(jobs[-1])))
        try:
            ends = await asyncio.gather(*(awaited(http, service.jobs, job) for job in jobs), return_exceptions=True)
        except asyncio.CancelledError:  # the server stops: what is made by now is paid for, and goes out
            if drawn := [task for job, task in zip(jobs, tasks, strict=True) if job.future and job.future.done()]:
                await asyncio.wait(drawn, timeout=LAST_SECONDS)  # what is drawn may not be written down yet
            ends = [so_far(task) for task in tasks]
    errors = [end for end in ends if isinstance(end, BaseException)]
    if len(errors) == len(ends):
        raise errors[0]
    why = Counter(logged(error, http.state.request_id).message for error in errors)
    told = [f"{count} of {len(ends)} not made: {message}" for message, count in why.items()]
    return [end for end in ends if isinstance(end, Answer)], told


def rendered(asked: PictureBody, answers: list[Answer]) -> bytes:
    """The answer's JSON: of many large pictures that takes a while."""
    pictures = [Generated(b64_json=base64.b64encode(a.content).decode(), made=made(a)) for a in answers]
    found = Generation(
        created=int(time.time()),
        output_format=asked.output_format or "png",
        size=f"{asked.data.width}x{asked.data.height}",
        data=pictures,
    )
    return found.model_dump_json().encode()


def add_openai_images(app: FastAPI, service: Service) -> None:
    described: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The pictures that were made; or a stream of events, the last of which has the picture.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
            "headers": NOTES | LIMITS,
        },
        **error_responses(400, 401, 402, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503),
    }
    body = {"required": True, "content": {"application/json": {"schema": GenerationBody.model_json_schema()}}}

    @app.post(
        "/v1/images/generations",
        response_model=Generation,
        responses=described,
        summary="OpenAI's Images API",
        openapi_extra={"parameters": [IDEMPOTENCY_HEADER], "requestBody": body},
        dependencies=[BEARER],
    )
    async def generate(http: HTTPRequest) -> Response:
        """Draws pictures. It is one request of those that the key may send in a minute, however many it asks for.

        Each is billed, and made or not, by itself: where some of several were not, the others are the answer, and
        X-Fulgurite-Notes says why.

        With `stream` the answer is server-sent events as OpenAI has them, each with JSON as its data:

        * `image_generation.partial_image`, after some of the steps, evenly spread, never the last: `b64_json`, a coarse
          preview enlarged to the picture's size; `partial_image_index`, from 0. Few steps have few partial images.
        * `image_generation.completed`, the last: `b64_json`; `made`, as without a stream; `usage`, all of it 0, since
          pictures are not billed by tokens.
        * `error`, the last instead, as in the stream of POST /api/v1.

        The first two have `type`, `created_at`, `size`, `quality`, `background` and `output_format` besides.
        """
        key = await service.admitted(http)
        asked = await read_body(http, service.settings.max_body_bytes, GenerationBody)
        service.check_served(asked.model)
        bodies = asked.pictures(card(asked.model).usual_size)
        count, most = len(bodies), key.limits.pictures_in_flight
        if most is not None and count > most:
            raise Problem(
                422, "invalid_parameter", f"n: this key may have {counted(most, 'picture')} made at once.", "n"
            )
        try:
            ordered = [numbered(service.order_of(http, key, body), i, count) for i, body in enumerate(bodies)]
        except RequestError as error:  # its parameters are in no "data" here
            raise Problem(422, "invalid_parameter", str(error), error.param) from None
        # Whatever its header Accept says. Where no partial image is wanted, no step is told.
        shown = (asked.partial_images or 0) if asked.stream else 0
        orders = [replace(order, stream=bool(shown), previews=shown) for order in ordered]
        unheeded = [f"{name} changes nothing here" for name in UNHEEDED if getattr(asked, name)]
        if asked.stream:
            await service.jobs.refuse_reuse(orders[0])
            data = bodies[0].data
            dialect = OpenAIDialect(data.width, data.height, asked.output_format or "png", asked.quality, shown)
            return await streamed(http, service.jobs, service.jobs.start(orders[0]), dialect, notes_header(unheeded))
        if asked.partial_images:
            unheeded.append("partial_images changes nothing without stream")
        answers, notes = await all_made(http, service, orders)
        content = await asyncio.to_thread(rendered, bodies[0], answers)
        return Response(content, media_type="application/json", headers=notes_header(notes + unheeded))

    @app.get("/v1/models", summary="The models, as OpenAI lists its own")
    async def models() -> Listing:
        """The models there are."""
        return Listing(data=[Listed(id=model) for model in service.served])

    @app.get("/v1/models/{model:path}", responses=error_responses(404, 422), summary="One of the models")
    async def model(model: str) -> Listed:
        """One of them."""
        service.check_served(model)
        return Listed(id=model)
