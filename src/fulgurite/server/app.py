"""The server: the hosted API, and what its operator and its customers need beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from fulgurite import __version__
from fulgurite.server.accounts import add_accounts
from fulgurite.server.catalogue import add_catalogue
from fulgurite.server.pictures import add_pictures
from fulgurite.server.problems import Envelope, add_problem_handlers
from fulgurite.server.protocol import Engine, Ledger
from fulgurite.server.service import Service
from fulgurite.settings import Settings


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
    add_catalogue(app, service)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """That the server answers, and how busy its engine is."""
        return {"status": "ok", "engine": engine.stats()}

    return app
