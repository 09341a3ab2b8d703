"""The server: the hosted API, and what its operator and its customers need beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from fulgurite import __version__
from fulgurite.server.accounts import add_accounts
from fulgurite.server.catalogue import add_catalogue
from fulgurite.server.envelope import Envelope
from fulgurite.server.headers import describe_everywhere
from fulgurite.server.listening import seconds_left
from fulgurite.server.metrics import add_watching
from fulgurite.server.openai_images import add_openai_images
from fulgurite.server.pictures import add_pictures
from fulgurite.server.predictions import add_predictions
from fulgurite.server.problems import add_problem_handlers
from fulgurite.server.protocol import Engine, Ledger
from fulgurite.server.service import Service
from fulgurite.settings import Settings

DESCRIPTION = """\
Pictures from a prompt: `POST /api/v1` answers with one, `/api/v1/predictions` makes it while you do something else.
`/v1/images/generations` is OpenAI's Images API.

Send your key as the header `Authorization: Bearer KEY`. A picture costs what its model's card says; one that was not
made costs nothing. A key may have a credit: when it is spent, the answer is 402. What goes wrong is told as
`{"error": {"code", "message", "param"}}`.
"""


def create_app(engine: Engine, ledger: Ledger, settings: Settings) -> FastAPI:
    """The server over an engine and a ledger; closing those is left to who made them."""
    service = Service(engine, ledger, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.jobs.finish(seconds_left(app, settings.shutdown_seconds))
        await service.webhooks.close()

    # Its pages bring their scripts with them: /docs works where there is no network.
    app = FastAPIOffline(
        title="Fulgurite",
        version=__version__,
        description=DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Envelope, metrics=service.metrics)
    add_problem_handlers(app)
    add_pictures(app, service)
    add_predictions(app, service)
    add_openai_images(app, service)
    add_accounts(app, service)
    add_catalogue(app, service)
    add_watching(app, engine, ledger, service.metrics)
    describe_everywhere(app)
    return app
