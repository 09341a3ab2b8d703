"""The body of ``POST /api/v1``: read within a bound, and checked to the last field."""

import asyncio
import re
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from fulgurite.parameters import Parameters, explain
from fulgurite.picture_file import FORMATS
from fulgurite.server.problems import Problem
from fulgurite.server.webhooks import URL_PATTERN

BODY_SECONDS = 30.0  # that a client has for sending its body


class PictureBody(BaseModel):
    """A model, and what it shall draw."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str = Field(max_length=200, description="The model's id.")
    data: Parameters
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="What the picture is encoded as; left out, what the header Accept prefers, else PNG."
    )

    stream: bool = Field(
        False, description="Server-sent events instead: queued, each step with a small preview, done with the picture."
    )

    def media_type(self, accept: str) -> str:
        """The picture's media type. Clients that accept none of those there are get a PNG, as from the hosted API."""
        if self.output_format:
            return FORMATS[self.output_format]
        return max(FORMATS.values(), key=lambda kind: quality(kind, accept))


Body = TypeVar("Body", bound=PictureBody)
Shape = TypeVar("Shape", bound=BaseModel)


class PredictionBody(PictureBody):
    """The same, and whom to tell when it is made."""

    webhook: str | None = Field(
        None,
        max_length=2000,
        description="An http or https URL that is sent the prediction at its end, signed.",
        json_schema_extra={"anyOf": [{"type": "string", "maxLength": 2000, "pattern": URL_PATTERN}, {"type": "null"}]},
    )


def quality(media_type: str, accept: str) -> float:
    """How much a client wants a media type, 0 to 1, by its header Accept. Wildcards are no preference."""
    for part in accept.lower().split(","):
        kind, _, parameters = part.partition(";")
        if kind.strip() == media_type:
            found = re.search(r"\bq=(\d(?:\.\d{1,3})?)", parameters)
            return float(found[1]) if found else 1.0
    return 0.0


def body_schema(kind: type[PictureBody]) -> dict[str, Any]:
    """The body for OpenAPI, in one piece."""
    schema = kind.model_json_schema()
    schema["properties"]["data"] = schema.pop("$defs")["Parameters"]
    return schema


async def read_body(http: Request, most: int, shape: type[Shape]) -> Shape:
    """Reads and checks the body. Raises Problem: 400, 408, 413, 415 or 422."""
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "unsupported_media_type", "Send JSON, with Content-Type: application/json.")
    raw = await read_bytes(http, most)
    try:
        # Pydantic's own JSON reader is strict where Python's is not: UTF-8 only, no lone surrogates, bounded depth.
        return shape.model_validate_json(raw)
    except ValidationError as error:
        param, message = explain(error)
        if error.errors(include_input=False)[0]["type"] == "json_invalid":
            raise Problem(400, "invalid_json", message) from None
        raise Problem(422, "invalid_parameter", message, param or None) from None


async def read_bytes(http: Request, most: int) -> bytes:
    """The body's bytes; no more than ``most`` are ever held, whether or not its length was announced."""
    too_large = Problem(413, "body_too_large", f"The body may have at most {most} bytes.")
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except ClientDisconnect:
        raise Problem(400, "client_gone", "The body ended early.") from None
    except TimeoutError:
        message = f"The body did not come within {BODY_SECONDS:g} s."
        raise Problem(408, "body_too_slow", message, headers={"Connection": "close"}) from None
    return bytes(body)
