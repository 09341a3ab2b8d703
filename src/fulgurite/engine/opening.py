"""The engine of one process as the settings have it: opened, and drawn with before anybody waits for it."""

import time
from collections.abc import Callable
from concurrent.futures import Future

from fulgurite.engine.engine import Engine
from fulgurite.engine.loading import Loader
from fulgurite.engine.runner import Runner
from fulgurite.kernels import compiled
from fulgurite.request import Picture, Request
from fulgurite.settings import Settings

Say = Callable[[str], None]


def open_engine(settings: Settings, say: Say) -> Engine:
    """Raises FulguriteError where this machine cannot do what the settings say."""
    loader = Loader.from_settings(settings)  # once here, so that what this machine cannot do is told at once
    say(f"Pictures are drawn in {loader.precision}, device {loader.device}.")

    def runner() -> Runner:
        if loader.device == "cpu":
            compiled.keep_apart()
        return Runner(Loader.from_settings(settings), exact=settings.exact)

    return Engine(runner, settings.queue_size, settings.deadline_seconds, settings.hang_seconds)


def warm_up(submit: Callable[[str, Request], Future[Picture]], settings: Settings, say: Say) -> None:
    """Draws a picture by each checkpoint that is to be ready when the first request comes.

    So its weights are loaded and laid out, and kernels compiled for the API's usual size. Raises what drawing raises.
    """
    for model, steps in settings.warm_checkpoints():
        request = Request("warm-up", num_steps=steps, seed=0, decoder=settings.usual_decoder(model))
        started = time.monotonic()
        picture = submit(model, request).result()
        seconds = time.monotonic() - started
        say(f"{picture.model} is warm: loading it and a picture of {picture.steps} steps took {seconds:.1f} s.")
