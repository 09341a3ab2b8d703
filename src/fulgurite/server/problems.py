"""Everything that can go wrong, as ``{"error": {"code", "message", "param"}}`` with the right status."""

import json
import logging
from asyncio import CancelledError
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from fulgurite.errors import (
    BusyError,
    CreditSpentError,
    DeviceError,
    FulguriteError,
    LedgerError,
    NotFiniteError,
    NotPulledError,
    OutOfMemoryError,
    RequestError,
    UnknownKeyError,
    UnknownModelError,
    WeightsError,
)
from fulgurite.parameters import no_parameter
from fulgurite.server.headers import LIMITS, OF_ERRORS

log = logging.getLogger("fulgurite")


class Problem(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers

    def response(self) -> Response:
        body = {"error": {"code": self.code, "message": self.message, "param": self.param}}
        # ASCII, because a message may quote what cannot be encoded as UTF-8.
        return Response(json.dumps(body), self.status, self.headers, media_type="application/json")


def problem(error: BaseException) -> Problem:
    """What an exception means to the client."""
    match error:
        case Problem():
            return error
        case UnknownModelError():
            return Problem(404, "unknown_model", str(error), error.param)
        case RequestError():
            return Problem(422, "invalid_parameter", str(error), f"data.{error.param}")
        case BusyError():
            return Problem(503, "busy", str(error), headers={"Retry-After": str(error.retry_after)})
        case NotPulledError():
            return Problem(503, "not_pulled", str(error), "model")
        case WeightsError():
            return Problem(503, "weights_unusable", str(error), "model")
        case OutOfMemoryError():
            return Problem(503, "out_of_memory", str(error))
        case NotFiniteError():
            return Problem(500, "not_finite", str(error))
        case DeviceError():
            return Problem(503, "device_failed", str(error), headers={"Retry-After": "5"})
        case CreditSpentError():
            return Problem(402, "credit_spent", str(error))
        case UnknownKeyError():
            return Problem(404, "unknown_key", str(error))
        case LedgerError():
            log.error("%s", error)
            message = "The ledger cannot be used now, so nothing is made and nothing is billed. Try again."
            return Problem(503, "ledger_unavailable", message, headers={"Retry-After": "5"})
        case RequestValidationError():
            return invalid(error)
        case CancelledError():
            return shutting_down()
        case HTTPException(status_code=404):
            return Problem(404, "not_found", "There is nothing at this address. Pictures are made by POST /api/v1.")
        case HTTPException():
            return Problem(error.status_code, "http_error", str(error.detail), headers=error.headers)
        case _:
            return Problem(500, "internal_error", "Something broke here. The log has more under this X-Request-Id.")


def shutting_down() -> Problem:
    return Problem(503, "shutting_down", "The server is shutting down.", headers={"Retry-After": "10"})


def wrong_method(request: Request) -> Problem:
    """Of all the routes at its address: Starlette tells of the first alone, and the docs' files have no methods."""
    here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    taken = {method for route in here for method in getattr(route, "methods", {"GET"})}
    allowed = ", ".join(sorted(taken | {"HEAD"} if "GET" in taken else taken))
    return Problem(405, "method_not_allowed", f"This address takes {allowed}.", headers={"Allow": allowed})


def logged(error: BaseException, request_id: str) -> Problem:
    """The problem, where no handler meets the error: then it is the log that has more of a bug."""
    found = problem(error)
    if found.code == "internal_error":
        log.error("request %s failed", request_id, exc_info=error)
    return found


def invalid(error: RequestValidationError) -> Problem:
    """What FastAPI found wrong with a query or a body that it read itself."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(400, "invalid_json", "The body is not JSON.")
    name = ".".join(str(part) for part in first["loc"][1:])[:100]
    message = f"{name}: {first['msg']}." if name else f"{first['msg']}."
    if first["type"] == "extra_forbidden":
        message = no_parameter(name)
    return Problem(422, "invalid_parameter", message, name or None)


def add_problem_handlers(app: FastAPI) -> None:
    """Turns the exceptions that are meant for clients into answers."""

    async def answer(request: Request, error: Exception) -> Response:
        found = logged(error, request.state.request_id)
        request.state.code = found.code
        return found.response()

    async def answer_wrong_method(request: Request, _: Exception) -> Response:
        return await answer(request, wrong_method(request))

    app.add_exception_handler(405, answer_wrong_method)
    for kind in (Problem, FulguriteError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses, all of the one shape."""
    text = {"type": "string"}
    shape = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message", "param"],
                "properties": {"code": text, "message": text, "param": {"type": ["string", "null"]}},
            }
        },
    }
    content = {"application/json": {"schema": shape}}
    return {
        status: {"description": "Error", "content": content, "headers": OF_ERRORS.get(status, {}) | LIMITS}
        for status in statuses
    }
