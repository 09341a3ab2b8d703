"""Who made what, when, at what price: written once, when a picture has come to its end.

That one transaction is all the state there is of a picture. It adds the entry, charges the key and keeps the answer,
and only then does a byte of the picture leave the server. So a crash at any moment leaves either nothing, and nothing
was billed, or everything, and a retry with the same idempotency key is given the picture that was paid for.
"""

import os
import queue
import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, delete, func, insert, or_, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite

from fulgurite.errors import CreditSpentError, FulguriteError, LedgerError
from fulgurite.ledger.database import connect
from fulgurite.ledger.keys import Keys
from fulgurite.ledger.tables import answers, entries, keys
from fulgurite.records import Answer, Entry, Usage, now
from fulgurite.settings import Settings

DAY = 86_400_000  # milliseconds
SWEEP_SECONDS = 60.0  # that expired answers may lie about
MOST_AT_ONCE = 256  # pictures settled by one commit
INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class Settlement(Future[Answer | None]):
    """One picture's end on its way into the ledger."""

    def __init__(self, entry: Entry, answer: Answer | None) -> None:
        super().__init__()
        self.entry, self.answer = entry, answer
        self.set_running_or_notify_cancel()  # from here on it cannot be taken back


class Ledger:
    """The ledger in one database. Safe to use from any thread; one thread writes, many pictures to a commit."""

    def __init__(self, url: str, make: bool = True) -> None:
        """Opens the database, and makes or updates its tables; ``make``: its file too. Raises LedgerError."""
        self._engine = connect(url, make)
        self._reading = self._engine.execution_options(reading=True)
        self.keys = Keys(self._engine)
        self._sweep_at = 0.0
        self._not_written: int | None = None  # the bytes of the picture that could not be written last
        self._waiting: queue.SimpleQueue[Settlement | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    def settle(self, entry: Entry, answer: Answer | None = None) -> Future[Answer | None]:
        """Writes a picture's end and charges its price; ``answer`` is kept for retries.

        The future ends, once that is on the disk, in the answer to give: ``answer``, or an earlier one of the same
        id or idempotency key, and then nothing was charged. It may end in CreditSpentError (the entry then says
        "refused", at no price) or in LedgerError, and then nothing was written.
        """
        settlement = Settlement(entry, answer)
        self._waiting.put(settlement)
        return settlement

    def answer(self, key_id: str, idempotency_key: str) -> Answer | None:
        """The answer that a key was given under its idempotency key; None where none is kept (any more)."""
        named = answers.c.key_id == key_id, answers.c.idempotency_key == idempotency_key
        wanted = select(answers).where(*named, answers.c.expires_at > now())
        with self._reading.begin() as connection:
            row = connection.execute(wanted).one_or_none()
        return as_answer(row) if row else None

    def usage(self, since: datetime, until: datetime, key_id: str | None = None) -> list[Usage]:
        """What was made from ``since`` until before ``until``, by day (UTC), model and key, in this order."""
        day = (type_coerce(entries.c.at, BigInteger) // DAY).label("day")
        made = entries.c.outcome == "done"
        groups = day, entries.c.model, entries.c.key_id
        sums = (
            func.count().filter(made).label("pictures"),
            func.count().filter(~made).label("not_made"),
            func.coalesce(func.sum(entries.c.steps_run).filter(made), 0).label("steps"),
            func.sum(entries.c.price).label("price"),
        )
        wanted = select(*groups, *sums).where(entries.c.at >= since, entries.c.at < until)
        if key_id is not None:
            wanted = wanted.where(entries.c.key_id == key_id)
        with self._reading.begin() as connection:
            rows = connection.execute(wanted.group_by(*groups).order_by(*groups)).all()
        epoch = datetime.fromtimestamp(0, now().tzinfo).date().toordinal()
        return [
            Usage(
                datetime.fromordinal(epoch + row.day).date(),
                row.model,
                row.key_id,
                row.pictures,
                row.not_made,
                int(row.steps),
                int(row.price),
            )
            for row in rows
        ]

    def entries(self, key_id: str | None = None) -> list[Entry]:
        """Every picture's end, oldest first."""
        wanted = select(entries).order_by(entries.c.at, entries.c.request_id)
        if key_id is not None:
            wanted = wanted.where(entries.c.key_id == key_id)
        with self._reading.begin() as connection:
            return [Entry(**{**row._mapping, "seed": int(row.seed)}) for row in connection.execute(wanted)]

    def check(self) -> None:
        """Whether a picture's end would be written now. Raises LedgerError.

        It reads a little; and only where the last settlement could not be written, it tries to write as much again,
        since a full disk can still be read.
        """
        with self._reading.begin() as connection:
            for table in (entries, answers):
                connection.execute(select(table.c.key_id).limit(1)).first()
            key_id = connection.execute(select(keys.c.id).limit(1)).scalar()
        size = self._not_written
        if size is None or key_id is None:
            return
        # Committed, since what is rolled back need not reach the disk. Expired already: if it stays, it is swept away.
        trial = Answer(f"trial {uuid.uuid4().hex}", key_id, None, "", "", {}, bytes(size), now())
        with self._engine.begin() as connection:
            connection.execute(insert(answers).values(**vars(trial)))
        with self._engine.begin() as connection:
            connection.execute(delete(answers).where(answers.c.key_id == key_id, answers.c.id == trial.id))
        self._not_written = None

    def close(self) -> None:
        """Writes what waits, and lets go of the database."""
        self._waiting.put(None)
        self._thread.join()
        self._engine.dispose()

    def _write(self) -> None:
        while batch := self._next():
            # Keys in one order in every server that shares the database, so that none waits for one that waits for it.
            batch.sort(key=lambda settlement: settlement.entry.key_id)
            try:
                results = self._commit(batch)
            except Exception:
                # One bad settlement must not take the others with it: each gets a transaction of its own.
                for settlement in batch:
                    self._commit_alone(settlement)
                continue
            self._not_written = None
            for settlement, result in zip(batch, results, strict=True):
                finish(settlement, result)

    def _next(self) -> list[Settlement]:
        """Waits for the next settlement, and takes those that have gathered since; none once closed."""
        batch: list[Settlement] = []
        while len(batch) < MOST_AT_ONCE and not (batch and self._waiting.empty()):
            settlement = self._waiting.get()
            if settlement is None:
                if batch:
                    self._waiting.put(None)
                break
            batch.append(settlement)
        return batch

    def _commit(self, batch: list[Settlement]) -> list[Answer | CreditSpentError | None]:
        with self._engine.begin() as connection:
            # Before any answer is kept, since an expired one may have its idempotency key; else now and then.
            if any(settlement.answer for settlement in batch) or time.monotonic() > self._sweep_at:
                connection.execute(delete(answers).where(answers.c.expires_at <= now()))
                self._sweep_at = time.monotonic() + SWEEP_SECONDS
            ends = [settled(connection, settlement.entry, settlement.answer) for settlement in batch]
            connection.execute(insert(entries), [vars(entry) | {"seed": str(entry.seed)} for entry, _ in ends])
            return [result for _, result in ends]

    def _written(self, settlement: Settlement, error: LedgerError) -> Answer | CreditSpentError | None:
        """What a settlement came to that is in the ledger; raises the error where it is not."""
        entry, answer = settlement.entry, settlement.answer
        same = [entries.c[name] == getattr(entry, name) for name in ("request_id", "key_id", "at")]
        with self._reading.begin() as connection:
            outcome = connection.execute(select(entries.c.outcome).where(*same)).scalar()
            if outcome is None:
                raise error
            if outcome == entry.outcome:
                return answer
            return (earlier(connection, answer) if answer else None) or credit_spent()

    def _commit_alone(self, settlement: Settlement) -> None:
        try:
            try:
                [result] = self._commit([settlement])
            except LedgerError as error:
                # Where the connection was lost in the middle of a commit, that was done perhaps all the same.
                result = self._written(settlement, error)
        except Exception as error:
            self._not_written = len(settlement.answer.content) if settlement.answer else 0
            settlement.set_exception(error)
        else:
            self._not_written = None
            finish(settlement, result)


def finish(settlement: Settlement, result: Answer | FulguriteError | None) -> None:
    if isinstance(result, FulguriteError):
        settlement.set_exception(result)
    else:
        settlement.set_result(result)


Settled = tuple[Entry, Answer | CreditSpentError | None]


def settled(connection: Connection, entry: Entry, answer: Answer | None) -> Settled:
    """Within a transaction: the price charged; gives the entry to write, and the answer that the client shall have."""
    if answer:
        # Another server that settles the same idempotency key now makes this statement wait for its commit.
        new = INSERT[connection.dialect.name](answers).values(**vars(answer)).on_conflict_do_nothing()
        if not connection.execute(new.returning(answers.c.id)).first():
            given = earlier(connection, answer)
            assert given  # it was in the way
            return replace(entry, price=0, outcome="refused"), given
    if entry.price and not charge(connection, entry):
        if answer:
            connection.execute(delete(answers).where(answers.c.key_id == answer.key_id, answers.c.id == answer.id))
        return replace(entry, price=0, outcome="refused"), credit_spent()
    return entry, answer


def credit_spent() -> CreditSpentError:
    return CreditSpentError("This key's credit does not cover this picture, which was not charged.")


def charge(connection: Connection, entry: Entry) -> bool:
    """Adds the price to what the key has spent, unless that would be more than its credit."""
    covered = or_(keys.c.credit.is_(None), keys.c.spent + entry.price <= keys.c.credit)
    spend = update(keys).where(keys.c.id == entry.key_id, covered).values(spent=keys.c.spent + entry.price)
    return connection.execute(spend).rowcount == 1


def earlier(connection: Connection, answer: Answer) -> Answer | None:
    """What the key was given under the same id or idempotency key."""
    same = answers.c.id == answer.id
    if answer.idempotency_key is not None:
        same = or_(same, answers.c.idempotency_key == answer.idempotency_key)
    row = connection.execute(select(answers).where(answers.c.key_id == answer.key_id, same)).one_or_none()
    return as_answer(row) if row else None


def as_answer(row: Row[Any]) -> Answer:
    return Answer(**row._mapping)


def open_ledger(settings: Settings, make: bool = True) -> Ledger:
    """The ledger that the settings name; without one, the file ledger.db under the home. Raises LedgerError.

    Unless ``make``, also where that is a file that is not there.
    """
    if settings.ledger:
        return Ledger(settings.ledger.get_secret_value(), make)
    if make:
        try:
            settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_keep_in(settings.home, str(error.strerror)) from None
    # SQLite would say no more than that it cannot open the file.
    if os.path.exists(settings.home) and not os.access(settings.home, os.W_OK):
        raise cannot_keep_in(settings.home, "it cannot be written to")
    return Ledger(f"sqlite:///{settings.home / 'ledger.db'}", make)


def cannot_keep_in(home: Path, why: str) -> LedgerError:
    return LedgerError(f"Cannot keep the ledger in {home}: {why}. Name another folder by --home or FULGURITE_HOME.")
