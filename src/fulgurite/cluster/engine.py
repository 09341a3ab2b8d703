"""What the server asks of an engine (fulgurite.server.protocol), by the engines of a Ray cluster."""

import asyncio
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import Literal

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from fulgurite.cards import card
from fulgurite.cluster.replica import Event, Place, StepTold
from fulgurite.errors import BusyError, DeviceError, FulguriteError
from fulgurite.request import OnStep, Picture, Request, plan

log = logging.getLogger("fulgurite")
TRIES = 3  # of a picture whose replica is lost
MOMENT = 2.0  # seconds
NOWHERE = Place(0, 0.0, begun=False)
Draw = Callable[[str, Request, str, bool], AsyncGenerator[Event, None]]


class Job(Future[Picture]):
    """One picture being made somewhere on the cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.place = NOWHERE
        self.steps_told = 0
        self.drawing: Future[None] | None = None  # what waits for it, on the cluster's thread

    def running(self) -> bool:
        return self.place.begun and not self.done()


class ClusterEngine:
    """Takes jobs from any thread and has replicas draw them; Ray chooses which, the less busy of any two.

    A job whose replica is lost is drawn again by another: with the same seed, so the picture is the same, and its steps
    are told once. Keys share each replica evenly, not the cluster.
    """

    def __init__(
        self,
        draw: Draw,
        running: Callable[[], int],
        queue_size: int,
        deadline_seconds: float,
        close: Callable[[], None],
    ) -> None:
        """``draw``: fulgurite.cluster.replica.Replica's, of any of them. ``running``: how many replicas there are."""
        self._draw, self._running, self._close = draw, running, close
        self._queue_size, self._deadline_seconds = queue_size, deadline_seconds
        self._jobs: set[Job] = set()
        self._counts = {"done": 0, "failed": 0, "redrawn": 0}
        self._closed = False
        self._changed = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()

    def submit(self, model: str, request: Request, on_step: OnStep | None = None, key: str = "") -> Future[Picture]:
        """Queues a job for ``key``. Its future ends in a picture, the job's error, or cancelled.

        Raises BusyError, RequestError and UnknownModelError. ``on_step`` is called on the cluster's thread.
        """
        plan(card(model), request)
        job = Job()
        with self._changed:
            if self._closed:
                raise BusyError("The engines are shutting down.", retry_after=10)
            waiting = [other.place.seconds for other in self._jobs if not other.place.begun]
            if len(waiting) >= (places := self._places()):
                retry_after = math.ceil(min(filter(None, waiting), default=10))
                raise BusyError(f"All {places} places in the queues are taken.", retry_after)
            self._jobs.add(job)
            making = self._make(job, model, request.seeded(), on_step, key)
            job.drawing = asyncio.run_coroutine_threadsafe(making, self._loop)
        return job

    def cancel(self, job: Future[Picture]) -> None:
        """Ends a job at once; its replica spends nothing further on it."""
        assert isinstance(job, Job)
        if job.cancel() and job.drawing:
            job.drawing.cancel()

    def position(self, job: Future[Picture]) -> int:
        """How many pictures its replica begins before this one; 0 once it is being made."""
        assert isinstance(job, Job)
        return job.place.position

    def seconds_until_begun(self, job: Future[Picture]) -> float:
        """About how long it waits yet."""
        assert isinstance(job, Job)
        return job.place.seconds

    def stats(self) -> dict[str, int]:
        """Jobs queued, running, done and failed; how often one was drawn again; the replicas that are there."""
        with self._changed:
            begun = sum(job.place.begun for job in self._jobs)
            return {"queued": len(self._jobs) - begun, "running": begun, **self._counts, "replicas": self._running()}

    def state(self) -> Literal["starting", "ready", "busy", "failed"]:
        """``ready``: takes jobs; ``busy``: all replicas' queues are full; ``failed``: closed, or without a replica."""
        stats = self.stats()
        if self._closed or not stats["replicas"]:
            return "failed"
        return "busy" if stats["queued"] >= self._places() else "ready"

    def close(self, seconds: float | None = None) -> None:
        """Ends every job, waited for at most a moment and ``seconds`` besides, and the replicas."""
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            self.cancel(job)
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(all_ended(), self._loop).result(MOMENT + (seconds or 0))
        try:
            self._close()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _places(self) -> int:
        """In all queues; while there is no replica, in that of one."""
        return self._queue_size * max(1, self._running())

    async def _make(self, job: Job, model: str, request: Request, on_step: OnStep | None, key: str) -> None:
        try:
            async with asyncio.timeout(self._deadline_seconds):
                picture = await self._drawn(job, model, request, on_step, key)
        except TimeoutError:
            self._fail(job, BusyError(f"It was not made within {self._deadline_seconds:g} s.", retry_after=60))
        except Exception as error:
            self._fail(job, error)
        else:
            self._forget(job)  # before its end, so that who waits for that finds it gone
            if job.set_running_or_notify_cancel():
                self._counts["done"] += 1
                job.set_result(picture)
        finally:
            job.cancel()  # where it has not ended by now: somebody stopped this who is not its client
            self._forget(job)

    async def _drawn(self, job: Job, model: str, request: Request, on_step: OnStep | None, key: str) -> Picture:
        lost: Exception | None = None
        for attempt in range(TRIES):
            self._counts["redrawn"] += attempt > 0
            try:
                async with aclosing(self._draw(model, request, key, on_step is not None)) as events:
                    async for event in events:
                        match event:
                            case Place():
                                job.place = event
                            case StepTold() if event.done > job.steps_told:
                                job.steps_told = event.done
                                assert on_step
                                on_step(event.done, event.steps, event.preview)
                            case Picture():
                                return event
                            case FulguriteError():
                                raise event
            except RayTaskError:
                raise  # a bug's exception
            except DeploymentUnavailableError as error:
                raise DeviceError("The cluster has no engines any more.") from error
            except (DeviceError, RayError) as error:
                log.warning("A replica was lost, and with it a picture on its way.", exc_info=error)
                lost, job.place = error, NOWHERE
        raise DeviceError("The replicas that drew it were lost, one after the other. Try again.") from lost

    def _forget(self, job: Job) -> None:
        with self._changed:
            self._jobs.discard(job)

    def _fail(self, job: Job, error: Exception) -> None:
        self._forget(job)
        if job.set_running_or_notify_cancel():
            self._counts["failed"] += not isinstance(error, BusyError)
            job.set_exception(error)


async def all_ended() -> None:
    """Waits for everything else on this thread, which was cancelled."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)
    await asyncio.get_running_loop().shutdown_asyncgens()
