"""One thread that draws all jobs together, a step at a time: schedule, run, update."""

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from fulgurite.cards import card
from fulgurite.engine.loading import checkpoint
from fulgurite.engine.runner import Drawing, Runner, StageOutcome
from fulgurite.engine.scheduler import Group, Scheduler, Task, Work
from fulgurite.errors import BusyError, DeviceError
from fulgurite.request import OnStep, Picture, Request, plan

log = logging.getLogger("fulgurite")
LOOK_SECONDS = 0.5  # between the watchdog's looks


class Job(Future[Picture]):
    """One picture being made."""

    def __init__(self, task: Task, drawing: Drawing) -> None:
        super().__init__()
        self.task, self.drawing = task, drawing


class Engine:
    """Takes jobs from any thread, gives pictures. What goes wrong with one job is that job's alone.

    ``make_runner`` is called on the engine's thread, which alone touches the device; again, if the thread has died or
    one stage took longer than ``hang_seconds``: then the jobs on their way fail, and another thread takes over.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        queue_size: int = 64,
        deadline_seconds: float = 3600,
        hang_seconds: float = 600,
    ) -> None:
        self._make_runner, self._queue_size = make_runner, queue_size
        self._deadline_seconds, self._hang_seconds = deadline_seconds, hang_seconds
        self._jobs: dict[Task, Job] = {}  # who takes a job out of here ends its future
        self._scheduler = Scheduler()
        self._counts = {"done": 0, "failed": 0, "steps": 0, "rows": 0}
        self._loaded = self._closed = self._device_failed = False
        self._futile_threads = 0  # that died one after the other without having run anything
        self._changed = threading.Condition()  # with a lock that a thread may take twice
        self._start()
        self._watchdog = threading.Thread(target=self._watch, name="engine-watchdog", daemon=True)
        self._watchdog.start()

    def submit(self, model: str, request: Request, on_step: OnStep | None = None, key: str = "") -> Future[Picture]:
        """Queues a job for ``key``. Its future ends in a picture, the job's error, or cancelled.

        Raises BusyError, and UnknownModelError. ``on_step`` is called on the engine's thread, which waits for it.
        """
        of_model = card(model)
        to = plan(of_model, request)
        group = Group(model, checkpoint(of_model, to.steps), to.latent_shape)
        task = Task(group, key, to.network_rows, to.steps, time.monotonic())
        job = Job(task, Drawing(request, on_step))
        with self._changed:
            if self._closed:
                raise BusyError("The engine is shutting down.", retry_after=10)
            if len(self._scheduler.waiting()) >= self._queue_size:
                retry_after = self._scheduler.seconds_until_a_place()
                raise BusyError(f"All {self._queue_size} places in the queue are taken.", retry_after)
            late = self._scheduler.seconds_of_work() - self._deadline_seconds
            if late > 0:
                raise BusyError(f"It would not be made within {self._deadline_seconds:g} s.", math.ceil(late))
            self._jobs[task] = job
            self._scheduler.add(task)
            self._changed.notify_all()
        return job

    def cancel(self, job: Future[Picture]) -> None:
        """Ends a job at once; its row is free at the next step."""
        assert isinstance(job, Job)
        if self._take(job.task) and not job.cancel():
            job.set_exception(BusyError("The engine stopped this job.", retry_after=10))

    def position(self, job: Future[Picture]) -> int:
        """How many waiting pictures are begun before this one; 0 once it is being made."""
        assert isinstance(job, Job)
        with self._changed:
            return self._scheduler.position(job.task) if job.task in self._jobs else 0

    def seconds_until_begun(self, job: Future[Picture]) -> float:
        """About how long it waits yet."""
        assert isinstance(job, Job)
        with self._changed:
            return self._scheduler.seconds_until_begun(job.task) if job.task in self._jobs else 0.0

    def stats(self) -> dict[str, int]:
        """Jobs queued, running, done and failed; the network's evaluations ("steps"), and the rows of them all."""
        with self._changed:
            queued = len(self._scheduler.waiting())
            return {"queued": queued, "running": len(self._jobs) - queued, **self._counts}

    def state(self) -> Literal["starting", "ready", "busy", "failed"]:
        """``starting``: loading its first weights; ``ready``: takes jobs; ``busy``: its queue is full.

        ``failed``: closed, or its device failed. Most errors of a GPU last until the process is restarted; a stage
        that succeeds ends the state.
        """
        with self._changed:
            if self._closed or self._device_failed or (self._futile_threads > 1 and not self._has_runner):
                return "failed"
            if self._jobs and not self._loaded:
                return "starting"
            return "busy" if len(self._scheduler.waiting()) >= self._queue_size else "ready"

    def close(self, seconds: float | None = None) -> None:
        """Ends every job and the thread, after the stage that it is at.

        That is waited for at most ``seconds``, or else ``hang_seconds``: a device that hangs is left alone.
        """
        with self._changed:
            self._closed = True
            jobs = list(self._jobs.values())
            self._changed.notify_all()
        for job in jobs:
            self.cancel(job)
        self._thread.join(self._hang_seconds if seconds is None else seconds)
        self._watchdog.join()

    def _start(self) -> None:
        self._busy_since = time.monotonic()  # when the stage that runs was begun, or the thread
        self._has_runner = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        runner = self._make_runner()
        with self._changed:
            if threading.current_thread() is not self._thread:
                return  # it took so long that another thread has taken over
            self._scheduler.switch_seconds = runner.switch_seconds
            self._has_runner = True
        while (work := self._schedule()) is not None:
            self._do(work, runner)

    def _do(self, work: Work, runner: Runner) -> None:
        """A function of its own, so that while the thread waits nothing holds what a stage had in memory."""
        started = time.monotonic()
        jobs = {job.drawing: job for task in work.tasks if (job := self._jobs.get(task))}
        if jobs:
            outcome = runner.run(work.stage, work.group, list(jobs))
            self._update(work, jobs, outcome, time.monotonic() - started)

    def _schedule(self) -> Work | None:
        """Waits for work that is still wanted; None once closed, or once another thread has taken over."""
        with self._changed:
            while threading.current_thread() is self._thread and not self._closed:
                self._busy_since = math.inf
                work = self._scheduler.next(time.monotonic())
                if work is None:
                    self._changed.wait()
                    continue
                if work.stage == "encode":
                    for task in work.tasks:
                        if not self._jobs[task].set_running_or_notify_cancel():
                            self._take(task)
                self._busy_since = time.monotonic()
                return work
            return None

    def _update(self, work: Work, jobs: dict[Drawing, Job], outcome: StageOutcome, seconds: float) -> None:
        with self._changed:
            if threading.current_thread() is not self._thread:
                return
            self._loaded, self._futile_threads = True, 0
            failures = [error for error in outcome.failed.values() if isinstance(error, DeviceError)]
            if failures or outcome.moved:
                self._device_failed = bool(failures)
            self._scheduler.ran(work, [jobs[drawing].task for drawing in outcome.moved], seconds, outcome.capacity)
            self._counts["steps"] += outcome.ran > 0
            self._counts["rows"] += outcome.ran
        for drawing, picture in outcome.pictures.items():
            if self._take(jobs[drawing].task, "done"):
                jobs[drawing].set_result(picture)
        for failure in failures:
            log.error("The device failed.", exc_info=failure)
        for drawing, error in outcome.failed.items():
            self._fail(jobs[drawing], error)

    def _take(self, task: Task, count: str = "") -> bool:
        """Takes a job out. False: somebody else has, and ends its future."""
        with self._changed:
            self._scheduler.remove(task)
            if self._jobs.pop(task, None) is None:
                return False
            if count:
                self._counts[count] += 1
            return True

    def _fail(self, job: Job, error: Exception) -> None:
        if self._take(job.task, "" if isinstance(error, BusyError) else "failed"):
            end(job, error)

    def _watch(self) -> None:
        """Gives late jobs up, and looks whether the thread lives and moves.

        If not, the jobs that it had begun fail, and another thread takes over; if that dies at once, all jobs fail.
        """
        while True:
            lost: list[Job] = []
            with self._changed:
                if self._closed:
                    return
                hangs = time.monotonic() - self._busy_since > self._hang_seconds
                if hangs or not self._thread.is_alive():
                    log.error("The engine's thread %s. Another one takes over.", "hangs" if hangs else "died")
                    self._futile_threads += 1
                    begun = [job for job in self._jobs.values() if job.running() or self._futile_threads > 1]
                    lost = [job for job in begun if self._take(job.task, "failed")]  # before it takes them up again
                    self._start()
                latest = time.monotonic() - self._deadline_seconds
                late = [job for task, job in self._jobs.items() if task.arrived < latest]
            for job in lost:
                end(job, DeviceError("The device stopped answering, so this picture is lost. Try again."))
            for job in late:
                self._fail(job, BusyError(f"It was not made within {self._deadline_seconds:g} s.", retry_after=60))
            with self._changed:
                self._changed.wait_for(lambda: self._closed, LOOK_SECONDS)


def end(job: Job, error: Exception) -> None:
    """Ends a job that was taken out, unless it was cancelled meanwhile."""
    if job.running() or job.set_running_or_notify_cancel():
        job.set_exception(error)
