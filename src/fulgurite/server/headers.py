"""The answers' headers, as OpenAPI describes them."""

from typing import Any

from fastapi import FastAPI


def header(description: str, kind: str = "string", required: bool = False) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": kind}}


EVERYWHERE = {"X-Request-Id": header("This request's id, by which the log tells of it.", required=True)}
RETRY_AFTER = {"Retry-After": header("In how many seconds to come back.", "integer")}
OF_ERRORS = {
    401: {"WWW-Authenticate": header("Bearer: how to send the key.", required=True)},
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}
LIMITS = {
    "X-RateLimit-Limit-Requests": header("Requests that the key may send in a minute, if that is limited.", "integer"),
    "X-RateLimit-Remaining-Requests": header("Of them, those it may send now.", "integer"),
    "X-RateLimit-Reset-Requests": header("When it may send all of them again, such as 12s."),
    "X-RateLimit-Limit-Pictures": header("Pictures that the key may have made at once, if that is limited.", "integer"),
    "X-RateLimit-Remaining-Pictures": header("Of them, those not taken as the request came.", "integer"),
}
NOTES = {"X-Fulgurite-Notes": header("What was not done as asked, if anything.")}
PICTURE = {
    "X-Fulgurite-Id": header("The request's that the picture was made for, as in the ledger."),
    "X-Fulgurite-Model": header("The model that drew it."),
    "X-Fulgurite-Steps": header("The steps run.", "integer"),
    "X-Fulgurite-Decoder": header("What decoded its latent: full or fast."),
    "X-Fulgurite-Seed": header("The seed, which was drawn if none was sent.", "integer"),
    "X-Fulgurite-Seconds": header("What making it took.", "number"),
    "X-Fulgurite-Price": header("Dollars.", "number"),
    **NOTES,
    "X-Fulgurite-Demo": header("That a much smaller model answers for the one asked for, if it does."),
    "Idempotent-Replayed": header("true: an earlier answer to the same idempotency key, not billed again."),
}


def describe_everywhere(app: FastAPI) -> None:
    """Adds to the app's OpenAPI the headers that every answer has."""
    without = app.openapi

    def openapi() -> dict[str, Any]:
        schema = without()
        for operations in schema["paths"].values():
            for operation in operations.values():
                for response in operation["responses"].values():
                    response.setdefault("headers", {}).update(EVERYWHERE)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
