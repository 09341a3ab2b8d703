"""A picture's way told while it is made, as server-sent events, the last of which is the picture or an error."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse

from fulgurite.records import Answer
from fulgurite.server.jobs import Job, Jobs, StepDone, made, so_far
from fulgurite.server.listening import time_is_up
from fulgurite.server.problems import logged

MEDIA_TYPE = "text/event-stream"
# Proxies must neither keep the events nor gather them.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
LOOK_SECONDS = 0.25  # between looks at the place in the queue
SILENCE_SECONDS = 15.0  # after which a comment is sent, so that proxies do not hang up


def event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


class Dialect(Protocol):
    """How an API's clients are told of what happens; b"" where they are not. Errors are told to all alike."""

    def queued(self, id: str, position: int | None, seconds: float) -> bytes: ...

    async def step(self, step: StepDone) -> bytes: ...

    def done(self, answer: Answer) -> bytes: ...


class OwnDialect:
    """That of ``POST /api/v1``: queued, step, done."""

    def queued(self, id: str, position: int | None, seconds: float) -> bytes:
        return event("queued", {"id": id, "position": position, "seconds": seconds})

    async def step(self, step: StepDone) -> bytes:
        preview = data_url("image/jpeg", step.preview) if step.preview else None
        return event("step", {"step": step.done, "steps": step.steps, "preview": preview})

    def done(self, answer: Answer) -> bytes:
        return event("done", made(answer) | {"picture": data_url(answer.media_type, answer.content)})


async def streamed(
    http: HTTPRequest, jobs: Jobs, job: Job, dialect: Dialect, headers: dict[str, str]
) -> StreamingResponse:
    """The job's events as an answer, which has these headers besides its own.

    Raises what keeps the job from being queued: a client that is told so by the status knows when to come back.
    """
    answer, news = asyncio.ensure_future(jobs.wait(job)), asyncio.Event()
    job.listeners.add(news)
    try:
        while not (job.future or answer.done()):
            await any_of(answer, news)
        if not job.future:
            answer.result()
    except BaseException:
        job.listeners.discard(news)
        answer.cancel()
        raise
    told = events(http, jobs, job, dialect, answer, news)
    return StreamingResponse(told, media_type=MEDIA_TYPE, headers=HEADERS | headers)


async def events(
    http: HTTPRequest, jobs: Jobs, job: Job, dialect: Dialect, answer: "asyncio.Future[Answer]", news: asyncio.Event
) -> AsyncIterator[bytes]:
    """The job's events. Who stops listening waits no longer, and a job that nobody waits for is cancelled.

    ``answer`` is this client's wait for the job; ``news`` is set when there is something to tell.
    """
    told, place, spoke = 0, None, time.monotonic()
    try:
        while True:
            ended = answer.done()  # looked at first: no step comes after the end
            news.clear()  # and this before the steps: telling of one may take until the next
            new = [await dialect.step(step) for step in job.steps[told:]]
            told += len(new)
            if not ended and not told and (now_at := jobs.position(job)) != place:
                place, seconds = now_at, round(jobs.seconds_until_begun(job), 3)
                new.append(dialect.queued(job.order.id, place, seconds))
            if time.monotonic() - spoke > SILENCE_SECONDS:
                new.append(b": still here\n\n")
            for line in filter(None, new):
                spoke = time.monotonic()
                yield line
            if ended:
                break
            await any_of(answer, news)
        yield last_event(http, answer, dialect)
    except asyncio.CancelledError:
        if not time_is_up(http.app):  # it was the client who stopped this, not the server
            raise
        yield last_event(http, answer, dialect)
    finally:
        job.listeners.discard(news)
        answer.cancel()


async def any_of(answer: "asyncio.Future[Answer]", news: asyncio.Event) -> None:
    """Waits for the answer, for news, or for the time to look again."""
    heard = asyncio.ensure_future(news.wait())
    try:
        waiting: set[asyncio.Future[Any]] = {answer, heard}
        await asyncio.wait(waiting, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        heard.cancel()


def last_event(http: HTTPRequest, answer: "asyncio.Future[Answer]", dialect: Dialect) -> bytes:
    """The picture, or what went wrong; if nothing has come yet, that the server stops."""
    found = so_far(answer)
    if isinstance(found, Answer):
        return dialect.done(found)
    said = logged(found, http.state.request_id)
    http.state.code = said.code
    seconds = (said.headers or {}).get("Retry-After")
    told = {
        "status": said.status,
        "error": {"code": said.code, "message": said.message, "param": said.param},
        "retry_after": int(seconds) if seconds else None,
        "request_id": http.state.request_id,
    }
    return event("error", told)
