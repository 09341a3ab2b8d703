"""The hosted API: one POST, picture bytes back."""

import asyncio
from concurrent.futures import Future
from dataclasses import fields
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from fulgurite import Picture, Request, __version__
from fulgurite.cards import card, cards
from fulgurite.errors import UnknownModelError
from fulgurite.picture_file import png_bytes
from fulgurite.server.body import body_schema, read_body
from fulgurite.server.key import matches
from fulgurite.server.problems import Envelope, Problem, add_problem_handlers, error_responses
from fulgurite.server.protocol import Engine
from fulgurite.settings import Settings

DEMO = {"bytedance/stable-diffusion-xl-lightning": "fulgurite/spark"}  # who answers for whom
NETWORKS = {"unet", "vae", "text_encoders", "weights"}  # a card's fields that are no client's business


def demo_notice(model: str) -> str:
    return f"Demo: {DEMO[model]}, a much smaller model, answers for {model}."


def create_app(engine: Engine, settings: Settings, key_hash: str) -> FastAPI:
    """The server over an engine. ``key_hash`` is the SHA-256 of the one API key."""
    served = list(settings.models or cards())
    for name in served:
        card(name)  # a model that is not there is an error now, not at the first request
    demo = DEMO if settings.demo else {}

    app = FastAPI(title="Fulgurite", version=__version__, redirect_slashes=False)
    app.add_middleware(Envelope)
    add_problem_handlers(app)

    def check_served(model: str) -> None:
        if model not in served:
            raise UnknownModelError(model, served)

    @app.post(
        "/api/v1",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **error_responses(400, 401, 404, 413, 415, 422, 500, 503)},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}},
            "security": [{"bearer": []}],
        },
    )
    async def draw(http: HTTPRequest) -> Response:
        """Draws one picture."""
        if not matches(http.headers.get("authorization", ""), key_hash):
            message = "Send your key as the header Authorization: Bearer KEY."
            raise Problem(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        body = await read_body(http, settings.max_body_bytes)
        check_served(body.model)
        job = engine.submit(demo.get(body.model, body.model), Request(**body.data.model_dump()))
        picture = await awaited(http, engine, job)
        headers = picture_headers(picture)
        if body.model in demo:
            headers["X-Fulgurite-Demo"] = demo_notice(body.model)
        # In a thread: encoding a large picture takes a good part of a second.
        return Response(await asyncio.to_thread(png_bytes, picture), media_type="image/png", headers=headers)

    @app.get("/api/v1/models")
    async def catalogue() -> dict[str, Any]:
        """The cards of the models there are."""
        return {"models": [card_json(model, demo) for model in served]}

    @app.get("/api/v1/models/{model:path}", responses=error_responses(404))
    async def catalogue_entry(model: str) -> dict[str, Any]:
        """One model's card."""
        check_served(model)
        return card_json(model, demo)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """That the server answers, and how busy its engine is."""
        return {"status": "ok", "engine": engine.stats()}

    return app


async def awaited(http: HTTPRequest, engine: Engine, job: Future[Picture]) -> Picture:
    """The job's picture. A client that goes away cancels its job."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    done, gone = asyncio.wrap_future(job), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Problem(499, "client_gone", "The client went away.")
        if done.cancelled():
            raise Problem(503, "shutting_down", "The server is shutting down.", headers={"Retry-After": "10"})
        return done.result()
    finally:
        gone.cancel()
        if not done.done():
            engine.cancel(job)
            done.cancel()


def picture_headers(picture: Picture) -> dict[str, str]:
    """How the picture was made, for those who look at headers."""
    headers = {
        "X-Fulgurite-Model": picture.model,
        "X-Fulgurite-Steps": str(picture.steps),
        "X-Fulgurite-Seed": str(picture.request.seed),
        "X-Fulgurite-Seconds": f"{picture.seconds:.3f}",
    }
    if picture.notes:
        one_line = " ".join("; ".join(picture.notes).split())
        headers["X-Fulgurite-Notes"] = one_line.encode("ascii", "replace").decode()
    return headers


def card_json(model: str, demo: dict[str, str]) -> dict[str, Any]:
    """A card as clients see it."""
    of_model = card(model)
    shown = {field.name: getattr(of_model, field.name) for field in fields(of_model) if field.name not in NETWORKS}
    if model in demo:
        shown |= {"answered_by": demo[model], "demo": demo_notice(model)}
    return shown
