"""What goes around every request: its id, its headers, one line in the log, and its place in the metrics."""

import asyncio
import json
import logging
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fulgurite.server.metrics import Metrics
from fulgurite.server.problems import problem

log = logging.getLogger("fulgurite")
LOGGED = ("key", "model", "code")  # of the request's state, where they are known


class Envelope:
    """Gives every answer an ``X-Request-Id``, makes of a bug a 500 that can be found in the log, and of HEAD a GET.

    ``request.state`` holds it as ``request_id``; what a handler puts there as ``headers`` goes with every answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id, status, began = uuid.uuid4().hex, 0, time.perf_counter()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        head = scope["method"] == "HEAD"
        asked = {**scope, "method": "GET"} if head else scope

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"X-Request-Id": request_id} | state.get("headers", {}))
            elif head:
                message = {**message, "body": b""}
            await send(message)

        async def refuse(error: BaseException) -> None:
            found = problem(error)
            state["code"] = found.code
            await found.response()(scope, receive, tagged)

        try:
            await self.app(asked, receive, tagged)
        except asyncio.CancelledError as error:  # the server stops; raised again, uvicorn would take it for a bug
            if not status:
                await refuse(error)
        except Exception as error:
            log.exception("request %s failed", request_id)
            if status:
                raise
            await refuse(error)
        finally:
            self._tell(scope, asked.get("route"), status, time.perf_counter() - began)

    def _tell(self, scope: Scope, route: Any, status: int, seconds: float) -> None:
        state = scope["state"]
        self.metrics.request(scope["method"], getattr(route, "path", "other"), status, state.get("code"))
        line = {"request_id": state["request_id"], "method": scope["method"], "path": scope["path"]}
        line |= {"status": status, "seconds": round(seconds, 4)}
        line |= {name: state[name] for name in LOGGED if state.get(name)}
        log.info("request", extra={"fields": line})


class JSONLines(logging.Formatter):
    """A log that machines read: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
