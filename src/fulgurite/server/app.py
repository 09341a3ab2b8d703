"""The server: the hosted API, and what its operator and its customers need beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

from fastapi import FastAPI

from fulgurite import __version__
from fulgurite.cards import card
from fulgurite.server.accounts import add_accounts
from fulgurite.server.pictures import add_pictures
from fulgurite.server.problems import Envelope, add_problem_handlers, error_responses
from fulgurite.server.protocol import Engine, Ledger
from fulgurite.server.service import Service, demo_notice
from fulgurite.settings import Settings

NETWORKS = {"unet", "vae", "text_encoders", "weights"}  # a card's fields that are no client's business


def create_app(engine: Engine, ledger: Ledger, settings: Settings) -> FastAPI:
    """The server over an engine and a ledger; closing those is left to who made them."""
    service = Service(engine, ledger, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.jobs.finish()

    app = FastAPI(title="Fulgurite", version=__version__, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Envelope)
    add_problem_handlers(app)
    add_pictures(app, service)
    add_accounts(app, service)

    @app.get("/api/v1/models")
    async def catalogue() -> dict[str, Any]:
        """The cards of the models there are."""
        return {"models": [card_json(model, service.demo) for model in service.served]}

    @app.get("/api/v1/models/{model:path}", responses=error_responses(404))
    async def catalogue_entry(model: str) -> dict[str, Any]:
        """One model's card."""
        service.check_served(model)
        return card_json(model, service.demo)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """That the server answers, and how busy its engine is."""
        return {"status": "ok", "engine": engine.stats()}

    return app


def card_json(model: str, demo: dict[str, str]) -> dict[str, Any]:
    """A card as clients see it."""
    of_model = card(model)
    shown = {field.name: getattr(of_model, field.name) for field in fields(of_model) if field.name not in NETWORKS}
    if model in demo:
        shown |= {"answered_by": demo[model], "demo": demo_notice(model)}
    return shown
