"""OpenAI's Images API, for the many programs that speak it: ``base_url="http://127.0.0.1:8000/v1"``."""

import asyncio
import base64
import re
import time
import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse

from fulgurite.cards import card
from fulgurite.errors import RequestError
from fulgurite.parameters import Parameters, whole
from fulgurite.records import Answer
from fulgurite.server.body import PictureBody, read_body
from fulgurite.server.headers import LIMITS, NOTES
from fulgurite.server.jobs import Order, made, notes_header
from fulgurite.server.pictures import BEARER, IDEMPOTENCY_HEADER, awaited
from fulgurite.server.problems import Problem, error_responses, logged
from fulgurite.server.service import Service

STEPS = {"low": 2, "medium": 4}  # the most that are spent; what else quality may be stands for all
UNHEEDED = ("moderation", "safety_identifier", "style", "user")  # what is said in these changes no picture here


SIDE = "(25[6-9]|2[6-9][0-9]|[3-9][0-9]{2}|1[0-9]{3}|20[0-3][0-9]|204[0-8])"  # pixels, as the hosted API has them
SIZE = f"^(auto|{SIDE}x{SIDE})$"


def within_bounds(size: str) -> str:
    if not re.fullmatch(SIZE, size):
        raise PydanticCustomError("size", "It should be WIDTHxHEIGHT, 256 to 2048 each, or auto")
    return size


class GenerationBody(Parameters):
    """OpenAI's parameters that can be kept here, and beside them all of the hosted API's."""

    model_config = ConfigDict(
        json_schema_extra={"not": {"anyOf": [{"required": ["size", "width"]}, {"required": ["size", "height"]}]}}
    )

    model: str = Field("bytedance/stable-diffusion-xl-lightning", max_length=200, description="The model's id.")
    n: Annotated[int, Field(ge=1, le=10), BeforeValidator(whole)] | None = Field(
        None, description="How many pictures, of seeds that count up: 1 unless said."
    )
    size: Annotated[str, AfterValidator(within_bounds), Field(json_schema_extra={"pattern": SIZE})] | None = Field(
        None, description="WIDTHxHEIGHT, instead of width and height; auto: the model's own."
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = Field(
        None, description="low: at most 2 steps, medium: 4, else 20; num_steps says it exactly."
    )
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come as base64; there are no URLs.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="PNG unless said.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    style: str | None = Field(None, max_length=200, description="Changes nothing, which a note says.")
    moderation: str | None = Field(None, max_length=200, description="Changes nothing, which a note says.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Changes nothing, which a note says.")
    user: str | None = Field(None, max_length=1000, description="Changes nothing, which a note says.")

    def pictures(self, usual_size: tuple[int, int]) -> list[PictureBody]:
        """The hosted API's body for each picture. Raises Problem (422)."""
        given = self.model_dump(include=set(Parameters.model_fields), exclude_unset=True)
        if "size" in self.model_fields_set and {"width", "height"} & set(given):
            raise Problem(422, "invalid_parameter", "size: send it, or width and height, not both.", "size")
        width, height = usual_size if self.size in (None, "auto") else map(int, self.size.split("x"))
        asked = {"width": width, "height": height} | given
        if self.quality in STEPS:
            asked = {"num_steps": STEPS[self.quality]} | asked
        bodies = []
        for number in range(self.n or 1):
            seed = {"seed": (given["seed"] + number) % 2**64} if "seed" in given else {}
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


def numbered(order: Order, number: int) -> Order:
    """The order of one of several pictures of a request: each has its own line in the ledger, and its own retries."""
    if not number:
        return order
    key = order.idempotency_key
    # No client's own, since it has a space, and no longer than one may be.
    again = f"image {uuid.uuid5(uuid.NAMESPACE_URL, f'{key} {number}').hex}" if key else None
    return replace(order, id=f"{order.id}-{number}", idempotency_key=again)


async def all_made(http: HTTPRequest, service: Service, orders: list[Order]) -> tuple[list[Answer], list[str]]:
    """The pictures that were made, and why others were not. Where none was, raises the first one's error."""
    jobs = [service.jobs.start(order) for order in orders]
    ends = await asyncio.gather(*(awaited(http, service.jobs, job) for job in jobs), return_exceptions=True)
    errors = [end for end in ends if isinstance(end, BaseException)]
    if len(errors) == len(ends):
        raise errors[0]
    told = [logged(error, http.state.request_id).message for error in errors]
    return [end for end in ends if isinstance(end, Answer)], told


def add_openai_images(app: FastAPI, service: Service) -> None:
    described: dict[int | str, dict[str, Any]] = {
        200: {"description": "The pictures that were made.", "headers": NOTES | LIMITS},
        **error_responses(400, 401, 402, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503),
    }
    body = {"required": True, "content": {"application/json": {"schema": GenerationBody.model_json_schema()}}}

    @app.post(
        "/v1/images/generations",
        response_model=Generation,
        responses=described,
        openapi_extra={"parameters": [IDEMPOTENCY_HEADER], "requestBody": body},
        dependencies=[BEARER],
    )
    async def generate(http: HTTPRequest) -> JSONResponse:
        """Draws pictures, as OpenAI's Images API does.

        Each is billed, and made or not, by itself: where some of several were not, the others are the answer, and
        X-Fulgurite-Notes says why.
        """
        key = await service.admitted(http)
        asked = await read_body(http, service.settings.max_body_bytes, GenerationBody)
        service.check_served(asked.model)
        bodies = asked.pictures(card(asked.model).usual_size)
        try:
            orders = [numbered(service.order_of(http, key, body), number) for number, body in enumerate(bodies)]
        except RequestError as error:  # its parameters are in no "data" here
            raise Problem(422, "invalid_parameter", str(error), error.param) from None
        answers, notes = await all_made(http, service, orders)
        notes += [f"{name} changes nothing here" for name in UNHEEDED if getattr(asked, name)]
        data = bodies[0].data
        found = Generation(
            created=int(time.time()),
            output_format=bodies[0].output_format or "png",
            size=f"{data.width}x{data.height}",
            data=[Generated(b64_json=base64.b64encode(a.content).decode(), made=made(a)) for a in answers],
        )
        return JSONResponse(found.model_dump(), headers=notes_header(notes))

    @app.get("/v1/models")
    async def models() -> Listing:
        """The models there are, as OpenAI lists its own."""
        return Listing(data=[Listed(id=model) for model in service.served])

    @app.get("/v1/models/{model:path}", responses=error_responses(404))
    async def model(model: str) -> Listed:
        """One of them."""
        service.check_served(model)
        return Listed(id=model)
