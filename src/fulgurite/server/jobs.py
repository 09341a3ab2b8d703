"""Pictures on their way: from the engine, through encoding, into the ledger, and only then to the client."""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

from fulgurite.errors import BusyError, CreditSpentError, FulguriteError
from fulgurite.picture_file import file_bytes, preview_bytes
from fulgurite.records import Answer, Entry, Key, Outcome, dollars, now
from fulgurite.request import Picture, Preview, Request
from fulgurite.server.limits import Meters
from fulgurite.server.metrics import Metrics
from fulgurite.server.problems import Problem, shutting_down
from fulgurite.server.protocol import Engine, Ledger

LAST_SECONDS = 5.0  # that what was stopped is given to be written into the ledger
KEY_REUSED = "idempotency_key_reused"
REPLAYED = {"Idempotent-Replayed": "true"}  # Stripe's header


@dataclass(frozen=True)
class Order:
    """One picture as it was asked for, and by whom."""

    id: str
    key: Key
    model: str  # who draws it
    request: Request
    media_type: str
    price: int  # micro-dollars, if it is made
    body_hash: str
    idempotency_key: str | None
    stream: bool = False  # its steps are told
    previews: int | None = None  # the most of its steps that are shown, none of them the last; None: all are
    headers: dict[str, str] = field(default_factory=dict)  # that the answer carries, besides how it was made

    def name(self) -> tuple[str, str]:
        return self.key.id, self.idempotency_key or self.id


@dataclass(frozen=True)
class StepDone:
    """A step of a picture that is streamed."""

    done: int
    steps: int  # in all
    preview: bytes | None  # a JPEG


@dataclass(eq=False)
class Job:
    """One picture being made, for one client or for several that sent the same idempotency key."""

    order: Order
    waiting: int = 0  # clients
    unwanted: bool = False  # all of them went away
    future: Future[Picture] | None = None  # the engine's
    answer: "asyncio.Task[Answer] | None" = None
    steps: list[StepDone] = field(default_factory=list)
    listeners: set[asyncio.Event] = field(default_factory=set)  # set once it is queued, and at each step

    def queued(self, future: Future[Picture]) -> None:
        self.future = future
        self.heard()

    def stepped(self, step: StepDone) -> None:
        self.steps.append(step)
        self.heard()

    def heard(self) -> None:
        for listener in self.listeners:
            listener.set()


class Jobs:
    """All pictures on their way in this process."""

    def __init__(self, engine: Engine, ledger: Ledger, keep_seconds: int, metrics: Metrics) -> None:
        self._engine, self._ledger, self._metrics = engine, ledger, metrics
        self._keep = timedelta(seconds=keep_seconds)
        # As many as there are cores: more would only wait for one another.
        self._encoders = ThreadPoolExecutor(os.cpu_count(), "encoder")
        self._running: dict[tuple[str, str], Job] = {}  # that a request may join
        self._tasks: set[asyncio.Task[Answer]] = set()
        self._stopping = False
        self.meters = Meters()

    def start(self, order: Order) -> Job:
        """Starts a picture, or joins the one that is being made under its idempotency key. Raises Problem (409)."""
        job = self._running.get(order.name())
        if job is None:
            job = self._running[order.name()] = Job(order)
            job.answer = asyncio.create_task(self._make(job))
            self._tasks.add(job.answer)
            job.answer.add_done_callback(self._ended)
        elif job.order.body_hash != order.body_hash:
            raise key_reused()
        return job

    async def wait(self, job: Job) -> Answer:
        """The job's answer. Who is cancelled here has gone away."""
        with self.waiting(job) as answer:
            return await asyncio.shield(answer)

    @contextmanager
    def waiting(self, job: Job) -> "Iterator[asyncio.Task[Answer]]":
        """While somebody waits for the job's answer. When nobody does any more, the work is stopped."""
        assert job.answer
        job.waiting += 1
        try:
            yield job.answer
        finally:
            job.waiting -= 1
            if not job.waiting and not job.answer.done():
                self.abandon(job)

    def abandon(self, job: Job) -> None:
        job.unwanted = True
        self._running.pop(job.order.name(), None)  # a retry shall not join what is being stopped
        if job.future:
            self._engine.cancel(job.future)

    async def earlier(self, order: Order) -> Answer | None:
        """The answer of an earlier request with the same idempotency key. Raises Problem (409)."""
        if order.idempotency_key is None:
            return None
        found = await asyncio.to_thread(self._ledger.answer, order.key.id, order.idempotency_key)
        return replayed(found, order) if found else None

    async def refuse_reuse(self, order: Order) -> None:
        """Raises Problem (409) where its idempotency key is another request's, made or being made."""
        job = self._running.get(order.name())
        if job and job.order.body_hash != order.body_hash:
            raise key_reused()
        await self.earlier(order)

    def position(self, job: Job) -> int | None:
        """How many pictures the engine makes before this one; None before it is queued."""
        return self._engine.position(job.future) if job.future else None

    def seconds_until_begun(self, job: Job) -> float:
        """About how long it waits yet, once it is queued."""
        return self._engine.seconds_until_begun(job.future) if job.future else 0.0

    async def finish(self, seconds: float) -> None:
        """Waits until everything that runs has come to its end in the ledger; after these seconds, it is stopped."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, seconds))
        self._stopping = True
        for job in list(self._running.values()):
            if not (job.future and job.future.done()):  # else it is drawn, and about to be delivered
                self.abandon(job)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST_SECONDS)

    def _ended(self, task: "asyncio.Task[Answer]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, though every client may have gone away

    async def _make(self, job: Job) -> Answer:
        try:
            return await self.earlier(job.order) or await self._drawn(job)
        finally:
            if self._running.get(job.order.name()) is job:
                del self._running[job.order.name()]

    async def _drawn(self, job: Job) -> Answer:
        order, started = job.order, time.monotonic()
        with self.meters.picture(order.key, order.price):
            try:
                picture = await self._picture(job)
                encoding = time.monotonic()
                content = await asyncio.get_running_loop().run_in_executor(
                    self._encoders, file_bytes, picture, order.media_type
                )
                self._metrics.phase("encoded", time.monotonic() - encoding)
            except Exception as error:
                await self._record(order, outcome(job, error), time.monotonic() - started)
                raise
            if job.unwanted and order.idempotency_key is None:
                await self._record(order, "cancelled", time.monotonic() - started)
                raise shutting_down() if self._stopping else client_gone()
            return await self._settled(order, picture, content, time.monotonic() - started)

    async def _picture(self, job: Job) -> Picture:
        loop = asyncio.get_running_loop()

        def on_step(done: int, steps: int, preview: Preview) -> None:
            image = preview() if shown(order, done, steps) else None
            step = StepDone(done, steps, preview_bytes(image) if image else None)
            loop.call_soon_threadsafe(job.stepped, step)

        order = job.order
        told = on_step if order.stream else None
        future = self._engine.submit(order.model, order.request, told, order.key.id)
        job.queued(future)
        if job.unwanted:
            self._engine.cancel(future)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
        except BusyError:  # as the engine ends what it draws already
            if not job.unwanted:
                raise
        if job.unwanted and not self._stopping:
            raise client_gone()
        raise shutting_down()

    async def _settled(self, order: Order, picture: Picture, content: bytes, seconds: float) -> Answer:
        """What the client is given, once it is paid for."""
        entry = entry_for(order, "done", seconds, picture)
        answer = Answer(
            order.id,
            order.key.id,
            order.idempotency_key,
            order.body_hash,
            order.media_type,
            {"X-Fulgurite-Id": order.id, **picture_headers(picture, order.price), **order.headers},
            content,
            now() + self._keep,
        )
        refused = replace(entry, price=0, outcome="refused")  # as the ledger then has it
        try:
            given = await asyncio.wrap_future(self._ledger.settle(entry, answer if order.idempotency_key else None))
        except CreditSpentError:
            self._metrics.picture(refused)
            raise
        if given is None or given is answer:
            self._metrics.picture(entry)
            return answer
        # Another job was first with its idempotency key: another server's, or one whose clients had gone.
        self._metrics.picture(refused)
        return replayed(given, order)

    async def _record(self, order: Order, how: Outcome, seconds: float) -> None:
        """A picture that was not made."""
        entry = entry_for(order, how, seconds)
        await asyncio.wrap_future(self._ledger.settle(entry))
        self._metrics.picture(entry)


def so_far(answer: "asyncio.Future[Answer]") -> Answer | BaseException:
    """What a job has ended in; if it has not yet, that the server stops."""
    if not answer.done() or answer.cancelled():
        return shutting_down()
    return answer.exception() or answer.result()


def shown(order: Order, done: int, steps: int) -> bool:
    """Whether a step is told with a preview: not with more than are wanted, since each takes the engine's time."""
    if order.previews is None:
        return True
    most = min(order.previews, steps - 1)
    return done in {steps * number // (most + 1) for number in range(1, most + 1)}  # spread evenly


def outcome(job: Job, error: Exception) -> Outcome:
    if job.unwanted:
        return "cancelled"
    return "refused" if isinstance(error, (Problem, FulguriteError)) else "failed"


def entry_for(order: Order, how: Outcome, seconds: float, picture: Picture | None = None) -> Entry:
    """What the ledger keeps of a picture ``seconds`` after it was asked for; ``picture``: where it was made."""
    request, computed = order.request, picture.seconds if picture else 0.0
    return Entry(
        request_id=order.id,
        key_id=order.key.id,
        at=now(),
        model=picture.model if picture else order.model,
        steps_asked=request.num_steps,
        steps_run=picture.steps if picture else 0,
        width=request.width,
        height=request.height,
        seed=(picture.request if picture else request).seed or 0,
        seconds_queued=max(0.0, seconds - computed),
        seconds_computed=computed,
        price=order.price if picture else 0,
        outcome=how,
    )


def replayed(earlier: Answer, order: Order) -> Answer:
    if earlier.body_hash != order.body_hash:
        raise key_reused()
    return replace(earlier, headers={**earlier.headers, **REPLAYED})


def key_reused() -> Problem:
    message = "This idempotency key was sent before, with another request. Use a new key for each picture."
    return Problem(409, KEY_REUSED, message, "Idempotency-Key")


def client_gone() -> Problem:
    return Problem(499, "client_gone", "The client went away.")


def picture_headers(picture: Picture, price: int) -> dict[str, str]:
    """How the picture was made, for those who look at headers."""
    return {
        "X-Fulgurite-Model": picture.model,
        "X-Fulgurite-Steps": str(picture.steps),
        "X-Fulgurite-Decoder": picture.request.decoder,
        "X-Fulgurite-Seed": str(picture.request.seed),
        "X-Fulgurite-Seconds": f"{picture.seconds:.3f}",
        "X-Fulgurite-Price": dollars(price),
        **notes_header(picture.notes),
    }


def notes_header(notes: Sequence[str]) -> dict[str, str]:
    """What was not done as asked, as headers can say it: in ASCII, with \\u72d0 for another letter."""
    one_line = " ".join("; ".join(notes).split())
    return {"X-Fulgurite-Notes": one_line.encode("ascii", "backslashreplace").decode()} if notes else {}


def made(answer: Answer) -> dict[str, str]:
    """How a picture was made, for those who look at JSON: what its headers say."""
    prefix = "x-fulgurite-"
    return {
        name.lower().removeprefix(prefix): value
        for name, value in answer.headers.items()
        if name.lower().startswith(prefix)
    }
