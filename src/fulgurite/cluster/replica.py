"""One engine on a Ray cluster: what runs on a worker's machine."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from PIL import Image

from fulgurite.cards import add
from fulgurite.engine import Engine, Say, open_engine, warm_up
from fulgurite.errors import DeviceError, FulguriteError
from fulgurite.request import Picture, Preview, Request
from fulgurite.settings import Settings

log = logging.getLogger("fulgurite")
LOOK_SECONDS = 2.0  # between two looks at a job's place in the queue: telling takes time, too


@dataclass(frozen=True)
class Place:
    """Where a job is: how many pictures come before it, in about how many seconds it is begun, whether it has been."""

    position: int
    seconds: float
    begun: bool


@dataclass(frozen=True)
class StepTold:
    """A step of a job whose steps are told."""

    done: int
    steps: int  # in all
    image: Image.Image | None

    def preview(self) -> Image.Image | None:
        return self.image


Event = Place | StepTold | Picture | FulguriteError  # the last two end a job


def start(settings: Settings, say: Say) -> Engine:
    """The engine that the settings describe, on this machine, warm. Raises FulguriteError."""
    add(settings.cards)
    engine = open_engine(settings, say)
    warm_up(engine.submit, settings, say)
    return engine


class Replica:
    """An engine, its jobs told as streams of events, the last of which is the picture or why there is none.

    What is nobody's fault but a bug's is raised instead. A device that failed ends the process, since that is what
    mends most such failures: Ray starts another, and the cluster draws elsewhere what was being drawn here.
    """

    def __init__(self, start: Callable[[Say], Engine]) -> None:
        self.said: list[str] = []
        self.engine = start(self.said.append)

    def ready(self) -> list[str]:
        """What starting had to say."""
        return self.said

    async def draw(self, model: str, request: Request, key: str, steps_told: bool) -> AsyncGenerator[Event, None]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[StepTold | None]()

        def tell(event: StepTold | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def on_step(done: int, steps: int, preview: Preview) -> None:
            tell(StepTold(done, steps, preview()))

        try:
            job = self.engine.submit(model, request, on_step if steps_told else None, key)
        except FulguriteError as error:
            yield error
            return
        job.add_done_callback(lambda _: tell(None))  # after the last step's event, which the same thread told
        try:
            while True:
                yield Place(self.engine.position(job), self.engine.seconds_until_begun(job), job.running())
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        event = await events.get()
                except TimeoutError:
                    continue
                if event is None:
                    break
                yield event
        finally:  # who asked may have gone away
            self.engine.cancel(job)
        failure = job.exception()
        if isinstance(failure, DeviceError):
            log.error("The device failed, so this engine ends.", exc_info=failure)
            os._exit(1)
        if isinstance(failure, FulguriteError):
            yield failure
        else:
            yield job.result()

    def check_health(self) -> None:
        """Ray asks this now and then. Raises DeviceError where another process should take over."""
        if self.engine.state() == "failed":
            raise DeviceError("The device failed.")
