"""One thread that draws jobs in the order they came."""

import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Literal, Protocol

from fulgurite.errors import BusyError, FulguriteError
from fulgurite.pipeline import OnStep, Picture, Preview, Request


class Drawer(Protocol):
    """What the engine needs of a pipeline."""

    def draw(self, request: Request, on_step: OnStep | None = None) -> Picture: ...


Load = Callable[[str, int], Drawer]  # model, most steps


class Job(Future[Picture]):
    """One picture being made."""

    def __init__(self, model: str, request: Request, on_step: OnStep | None) -> None:
        super().__init__()
        self.model, self.request, self.on_step = model, request, on_step


def broken(error: BaseException) -> RuntimeError:
    """A bug, in an exception that may cross threads: not every one may (StopIteration, SystemExit)."""
    failure = RuntimeError("drawing failed")
    failure.__cause__ = error
    return failure


class Engine:
    """Takes jobs, gives pictures. What goes wrong with one job is that job's alone.

    ``load`` is called on the engine's thread only, which alone touches the device.
    """

    def __init__(self, load: Load, queue_size: int = 64) -> None:
        self._load, self._queue_size = load, queue_size
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._abandoned = False  # the running job is not wanted any more
        self._closed = False
        self._done = self._failed = 0
        self._loading = False
        self._usual_seconds = 1.0  # of a picture, by a moving average
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, model: str, request: Request, on_step: OnStep | None = None) -> Future[Picture]:
        """Queues a job. Its future ends in a picture, the job's error, or cancelled. Raises BusyError.

        ``on_step`` is called on the engine's thread, which waits for it.
        """
        job = Job(model, request, on_step)
        with self._changed:
            if self._closed:
                raise BusyError("The engine is shutting down.", retry_after=10)
            if len(self._queue) >= self._queue_size:
                raise BusyError(
                    f"All {self._queue_size} places in the queue are taken.", math.ceil(self._usual_seconds)
                )
            self._queue.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Future[Picture]) -> None:
        """Takes a waiting job off the queue; a running one stops at its next step."""
        with self._changed:
            self._abandoned |= job is self._running
            self._queue = deque(waiting for waiting in self._queue if waiting is not job)
        job.cancel()

    def position(self, job: Future[Picture]) -> int:
        """How many pictures come before this one; 0 once it is being made."""
        with self._changed:
            waiting = next((i for i, other in enumerate(self._queue) if other is job), None)
            return 0 if waiting is None else waiting + int(self._running is not None)

    def stats(self) -> dict[str, int]:
        """Jobs waiting, running, done and failed."""
        with self._changed:
            running = int(self._running is not None)
            return {"queued": len(self._queue), "running": running, "done": self._done, "failed": self._failed}

    def state(self) -> Literal["starting", "ready", "busy", "failed"]:
        """Loading its first weights, able to take a job, without a place for one, or closed or broken."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                return "failed"
            if len(self._queue) >= self._queue_size:
                return "busy"
            return "starting" if self._loading and not self._done else "ready"

    def close(self) -> None:
        """Cancels what waits, stops what runs at its next step, and ends the thread."""
        with self._changed:
            self._closed = self._abandoned = True
            waiting, self._queue = self._queue, deque()
            self._changed.notify()
        for job in waiting:
            job.cancel()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                picture = self._loaded(job).draw(job.request, partial(self._stepped, job))
            except BaseException as error:
                self._finish(failed=not isinstance(error, BusyError))
                job.set_exception(error if isinstance(error, FulguriteError) else broken(error))
            else:
                self._usual_seconds += (picture.seconds - self._usual_seconds) / 8
                self._finish(failed=False, done=True)
                job.set_result(picture)

    def _loaded(self, job: Job) -> Drawer:
        self._loading = True
        try:
            return self._load(job.model, job.request.num_steps)
        finally:
            self._loading = False

    def _next(self) -> Job | None:
        """Waits for the next job that is still wanted; None once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return None
                job = self._queue.popleft()
                if job.set_running_or_notify_cancel():
                    self._running, self._abandoned = job, False
                    return job

    def _stepped(self, job: Job, done: int, steps: int, preview: Preview) -> None:
        if self._abandoned:
            raise BusyError("The engine stopped this job.", retry_after=10)
        if job.on_step:
            job.on_step(done, steps, preview)

    def _finish(self, *, failed: bool, done: bool = False) -> None:
        with self._changed:
            self._running = None
            self._failed += failed
            self._done += done
