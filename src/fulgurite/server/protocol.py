"""What the server needs of an engine, and no more."""

from concurrent.futures import Future
from typing import Protocol

from fulgurite import Picture, Request


class Engine(Protocol):
    """Takes jobs from any thread, and answers each at its own time."""

    def submit(self, model: str, request: Request) -> Future[Picture]:
        """Queues one picture, without waiting. Raises BusyError where there is no room.

        The future ends in a Picture, in a FulguriteError (the request's or the weights' fault), in another
        exception (a bug), or cancelled (the engine is closing).
        """

    def cancel(self, job: Future[Picture]) -> None:
        """Nobody waits for this job any more: spend nothing further on it."""

    def stats(self) -> dict[str, int]:
        """Jobs ``queued``, ``running``, ``done`` and ``failed``."""
