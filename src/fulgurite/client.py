"""A client of the hosted API, for one's own server or a host's: retries that never make or bill a picture twice.

>>> from fulgurite import Client                                             # doctest: +SKIP
>>> with Client("http://127.0.0.1:8000/api/v1", key) as client:              # doctest: +SKIP
...     client.draw("futuristic spacecraft", seed=12345).save("output.png")  # doctest: +SKIP
"""

import asyncio
import base64
import inspect
import io
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

import httpx
from PIL import Image

from fulgurite.errors import FulguriteError

LIGHTNING = "bytedance/stable-diffusion-xl-lightning"
PASSING = {0, 429, 500, 502, 503, 504}  # what may go well a moment later; 0: the server was not reached
LASTING = {"not_pulled", "weights_unusable", "out_of_memory"}  # codes of what goes well only once somebody acts
OF_THE_SEED = {"not_finite"}  # codes of what goes well with another seed alone
EVENTS = "text/event-stream"
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says


class APIError(FulguriteError):
    """The server said no, or could not be reached; then ``status`` is 0."""

    def __init__(
        self, message: str, status: int = 0, code: str = "unreachable", param: str | None = None, request_id: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.request_id = status, code, param, request_id


@dataclass(frozen=True)
class Drawn:
    """A picture as the server sent it, and what its headers say; None where a host does not say it."""

    content: bytes  # the file
    media_type: str
    id: str | None
    model: str | None  # that drew it
    seed: int | None
    steps: int | None  # run
    decoder: str | None
    seconds: float | None
    price: str | None  # dollars
    notes: str | None  # what was not done as asked

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.content)

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.content))


@dataclass(frozen=True)
class Step:
    """A step done, while the picture is made."""

    done: int
    steps: int  # in all
    preview: bytes | None  # a small JPEG


class Options(TypedDict, total=False):
    """What a request may say besides its prompt; what is left out, or None, is left to the server."""

    model: str | None
    negative_prompt: str | None
    height: int | None  # pixels
    width: int | None
    num_steps: int | None  # the most that may be spent
    guidance: float | None
    seed: int | None
    decoder: Literal["full", "fast"] | None
    output_format: Literal["png", "jpeg", "webp"] | None
    idempotency_key: str | None  # else a new one for each call
    # Called at each step, by servers that stream; hosts answer as ever. AsyncClient awaits what can be awaited.
    on_step: Callable[[Step], object] | None


Exchange = Generator[httpx.Request | float, httpx.Response | httpx.TransportError | None, Drawn]


def checked(url: str, key: str) -> tuple[str, str]:
    """The API's address, and a key that a header can hold. Raises ValueError; the key, a secret, is not shown."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"The url {url!r} cannot be read: {error}.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"The url {url!r} is no full address: write it as http://127.0.0.1:8000/api/v1.")
    if not key:
        raise ValueError("The key is empty: give the one that the server's `fulgurite keys create` or the host showed.")
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("The key has a space, a line end or a letter beyond ASCII in it, as no key has: remove it.")
    return url.rstrip("/"), key


def exchange(url: str, key: str, retries: int, prompt: str, options: Options) -> Exchange:
    """One picture's requests, retries and waits, without I/O, so that Client and AsyncClient share them (sans-I/O).

    Yields requests to be sent, and is sent what came of them; yields seconds to be waited; returns the picture.
    """
    given = {name: value for name, value in options.items() if value is not None}
    data: dict[str, Any] = {"prompt": prompt, **given}
    body = {"model": data.pop("model", LIGHTNING), "data": data}
    if "output_format" in data:
        body["output_format"] = data.pop("output_format")
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": data.pop("idempotency_key", str(uuid.uuid4()))}
    extensions = {}
    if on_step := data.pop("on_step", None):
        headers["Accept"], extensions["on_step"] = EVENTS, on_step
    lasting = LASTING if "seed" not in data else LASTING | OF_THE_SEED
    tries = 0
    while True:
        request = httpx.Request("POST", url, json=body, headers=headers, extensions=extensions)
        came = yield request
        if isinstance(came, httpx.Response) and came.is_success:
            try:
                return drawn(came)
            except ValueError as error:
                came = httpx.RemoteProtocolError(f"the answer has a malformed header: {error}")
        failed = failure(came, url)
        if isinstance(came, httpx.ReadTimeout) and not on_step:
            raise too_slow(request)
        if tries >= retries or failed.status not in PASSING or failed.code in lasting:
            raise failed
        yield pause(came, tries)
        tries += 1


def too_slow(request: httpx.Request) -> APIError:
    """Of an answer that was waited for in vain: servers stop what nobody waits for, so a retry would begin anew."""
    seconds = request.extensions["timeout"]["read"]
    message = f"{request.url} did not answer within {seconds:g} s: give the client a longer timeout."
    return APIError(message, code="timeout")


def pause(came: httpx.Response | httpx.TransportError | None, tries: int) -> float:
    """Seconds until the next try: as the server asks, else twice as long each time, not all clients at once."""
    asked = came.headers.get("retry-after", "") if isinstance(came, httpx.Response) else ""
    return min(LONGEST_WAIT, float(asked) if asked.isdecimal() else 0.25 * 2**tries * random.uniform(0.5, 1.5))


def failure(came: httpx.Response | httpx.TransportError | None, url: str) -> APIError:
    if not isinstance(came, httpx.Response):
        return APIError(f"{url} cannot be reached: {str(came) or type(came).__name__}.")
    try:
        error = came.json()["error"]
        message, code, param = error["message"], str(error["code"]), error.get("param")
    except (ValueError, LookupError, TypeError):  # not from one of ours: a proxy's page, say
        message, code, param = f"{url} answered {came.status_code} {came.reason_phrase}.", "http_error", None
    return APIError(message, came.status_code, code, param, came.headers.get("x-request-id", ""))


class Story:
    """Assembles server-sent events into the response that they stand for."""

    def __init__(self) -> None:
        self._event = ""
        self.answer: httpx.Response | httpx.TransportError = httpx.RemoteProtocolError("the stream ended early")

    def hear(self, line: str) -> Step | None:
        """The step that the line tells of, if any. Raises RemoteProtocolError at what is no event of a picture's."""
        name, _, value = line.partition(": ")
        if name == "event":
            self._event = value
        elif name == "data":
            try:
                told = told_by(self._event, json.loads(value))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise httpx.RemoteProtocolError(f"the stream has a malformed event: {self._event}") from error
            if isinstance(told, Step):
                return told
            self.answer = told or self.answer
        return None


def told_by(event: str, data: dict[str, Any]) -> Step | httpx.Response | None:
    """The step, or the answer, that an event stands for; None if it is another event."""
    if event == "step":
        return Step(data["step"], data["steps"], from_data_url(data["preview"])[1] if data["preview"] else None)
    if event == "done":
        media_type, content = from_data_url(data.pop("picture"))
        headers = {"Content-Type": media_type} | {f"X-Fulgurite-{name}": value for name, value in data.items()}
        answer = httpx.Response(200, content=content, headers=headers)
        drawn(answer)  # raises now, while a try is left, what it would raise of its numbers at the end
        return answer
    if event == "error":
        if not 400 <= data["status"] < 600:
            raise ValueError("no status of an error")
        headers = {"X-Request-Id": data.get("request_id", "")}
        if (seconds := data.get("retry_after")) is not None:
            headers["Retry-After"] = str(seconds)
        return httpx.Response(data.pop("status"), json=data, headers=headers)
    return None


def from_data_url(url: str) -> tuple[str, bytes]:
    """Its media type and content. Raises ValueError."""
    head, content = url.removeprefix("data:").split(";base64,")
    return head, base64.b64decode(content, validate=True)


def streams(answer: httpx.Response) -> bool:
    return answer.headers.get("content-type", "").startswith(EVENTS)


def drawn(answer: httpx.Response) -> Drawn:
    def said(name: str) -> str | None:
        return answer.headers.get(f"x-fulgurite-{name}")

    seed, steps, seconds = said("seed"), said("steps"), said("seconds")
    return Drawn(
        content=answer.content,
        media_type=answer.headers.get("content-type", ""),
        id=said("id"),
        model=said("model"),
        seed=int(seed) if seed else None,
        steps=int(steps) if steps else None,
        decoder=said("decoder"),
        seconds=float(seconds) if seconds else None,
        price=said("price"),
        notes=said("notes"),
    )


class Client:
    """``url`` is the API's, such as http://127.0.0.1:8000/api/v1.

    ``timeout``, in seconds, bounds each wait of a try: for the connection, and for the next bytes to go or to come.
    A picture comes at once when it is made, so that is how long its making may take. With ``on_step`` nothing bounds
    the whole: every event, and every comment that keeps the stream alive, is waited for anew.

    A request that failed on its way, or that the server could not take now, is sent again up to ``retries`` times
    with the same idempotency key: the picture is made once and billed once. One that was not answered in time is not:
    the server would begin anew.

    Raises ValueError where ``url`` is no address, or ``key`` no key.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        retries: int = 4,
        timeout: float = 300.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._server = *checked(url, key), retries
        self._http = httpx.Client(timeout=timeout, transport=transport)

    def draw(self, prompt: str, **options: Unpack[Options]) -> Drawn:
        """Draws one picture. Raises APIError."""
        talk, came = exchange(*self._server, prompt, options), None
        while True:
            try:
                wanted = talk.send(came)
            except StopIteration as end:
                return end.value
            came = None
            if isinstance(wanted, float):
                time.sleep(wanted)
            else:
                came = self._sent(wanted)

    def _sent(self, request: httpx.Request) -> httpx.Response | httpx.TransportError:
        request.extensions["timeout"] = self._http.timeout.as_dict()
        try:
            answer = self._http.send(request, stream=True)
            with closing(answer):
                if not streams(answer):
                    answer.read()
                    return answer
                story = Story()
                for line in answer.iter_lines():
                    if step := story.hear(line):
                        request.extensions["on_step"](step)
                return story.answer
        except httpx.TransportError as error:
            return error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """Client, for asyncio."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        retries: int = 4,
        timeout: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._server = *checked(url, key), retries
        self._http = httpx.AsyncClient(timeout=timeout, transport=transport)

    async def draw(self, prompt: str, **options: Unpack[Options]) -> Drawn:
        """Draws one picture. Raises APIError."""
        talk, came = exchange(*self._server, prompt, options), None
        while True:
            try:
                wanted = talk.send(came)
            except StopIteration as end:
                return end.value
            came = None
            if isinstance(wanted, float):
                await asyncio.sleep(wanted)
            else:
                came = await self._sent(wanted)

    async def _sent(self, request: httpx.Request) -> httpx.Response | httpx.TransportError:
        request.extensions["timeout"] = self._http.timeout.as_dict()
        try:
            answer = await self._http.send(request, stream=True)
            async with aclosing(answer):
                if not streams(answer):
                    await answer.aread()
                    return answer
                story = Story()
                async for line in answer.aiter_lines():
                    if step := story.hear(line):
                        done = request.extensions["on_step"](step)
                        if inspect.isawaitable(done):
                            await done
                return story.answer
        except httpx.TransportError as error:
            return error

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
