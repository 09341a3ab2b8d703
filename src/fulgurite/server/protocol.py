"""What the server needs of an engine and of a ledger, and no more."""

from concurrent.futures import Future
from datetime import datetime
from typing import Literal, Protocol

from fulgurite.records import Answer, Entry, Key, Limits, Usage
from fulgurite.request import OnStep, Picture, Request

EngineState = Literal["starting", "ready", "busy", "failed"]


class Engine(Protocol):
    """Takes jobs from any thread, and answers each at its own time."""

    def submit(self, model: str, request: Request, on_step: OnStep | None = None, key: str = "") -> Future[Picture]:
        """Queues one picture for ``key``, without waiting; the engine is shared among keys.

        Raises BusyError where there is no room. Steps are told on any thread.

        The future ends in a Picture, in a FulguriteError (the request's or the weights' fault), in another
        exception (a bug), or cancelled (the engine is closing).
        """

    def cancel(self, job: Future[Picture]) -> None:
        """Nobody waits for this job any more: spend nothing further on it."""

    def position(self, job: Future[Picture]) -> int:
        """How many pictures come before this one; 0 once it is being made."""

    def seconds_until_begun(self, job: Future[Picture]) -> float:
        """About how long it waits yet."""

    def stats(self) -> dict[str, int]:
        """Jobs ``queued``, ``running``, ``done`` and ``failed``; there may be more numbers."""

    def state(self) -> EngineState:
        """``starting``: loading its first weights; ``ready``: takes jobs; ``busy``: its queue is full.

        ``failed``: closed, or its device failed.
        """


class Keys(Protocol):
    """Who may ask. Those that change or find may wait for a database; all but ``remembered`` raise LedgerError."""

    def create(self, name: str, limits: Limits = ..., admin: bool = ...) -> tuple[Key, str]:
        """A new key and its secret."""

    def all(self) -> list[Key]:
        """Every key, oldest first."""

    def revoke(self, key_id: str) -> Key:
        """Ends a key. Raises UnknownKeyError."""

    def rotate(self, key_id: str) -> tuple[Key, str]:
        """Gives a key another secret. Raises UnknownKeyError."""

    def remembered(self, secret: str) -> Key | None:
        """The secret's key, where that is known without waiting."""

    def find(self, secret: str) -> Key | None:
        """The secret's key, in whatever state it is; None where there is none."""


class Ledger(Protocol):
    """Who made what, at what price."""

    @property
    def keys(self) -> Keys: ...

    def settle(self, entry: Entry, answer: Answer | None = None) -> Future[Answer | None]:
        """Writes a picture's end, charges its price and keeps the answer, all or nothing.

        The future ends in the answer to give, which is an earlier one where there was one; in CreditSpentError; or
        in LedgerError.
        """

    def answer(self, key_id: str, idempotency_key: str) -> Answer | None:
        """An answer that was kept. May wait for a database."""

    def usage(self, since: datetime, until: datetime, key_id: str | None = None) -> list[Usage]:
        """By day, model and key. May wait for a database."""

    def check(self) -> None:
        """Whether it can be used now. May wait for a database. Raises LedgerError."""
