"""The ledger's database: connections that fit SQLite and PostgreSQL, and the schema brought up to date."""

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from fulgurite.errors import LedgerError

MIGRATIONS = Path(__file__).parent / "migrations"
PATIENCE = 30  # seconds, that one SQLite connection waits for another
DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
MIGRATION_LOCK = 0x666C6772  # any number, the same in every server that shares a PostgreSQL


def connect(url: str, make: bool = True) -> Engine:
    """An engine on the newest schema; ``make``: SQLite's file is made if need be.

    Raises LedgerError; no message of it carries the URL's password.
    """
    try:
        parsed = with_driver(make_url(url))
        if not make:
            check_is_there(parsed)
        engine = on_sqlite(parsed) if parsed.drivername == "sqlite" else on_postgresql(parsed)
    except (ArgumentError, ValueError):  # of a port that is no number
        raise LedgerError(
            "FULGURITE_LEDGER is not a database's URL, such as postgresql://USER:PASSWORD@HOST/NAME."
        ) from None
    except ModuleNotFoundError as error:
        raise LedgerError(f"The ledger needs {error.name}: in the checkout, pip install -e '.[postgres]'.") from None
    try:
        migrate(engine)
    except (SQLAlchemyError, LedgerError) as error:
        engine.dispose()
        if isinstance(error, LedgerError):
            raise
        why = str(getattr(error, "orig", error)).partition("\n")[0]
        raise LedgerError(f"Cannot open the ledger {parsed.render_as_string()}: {why}.") from None

    @event.listens_for(engine, "handle_error")
    def explain(context: ExceptionContext) -> None:
        if context.is_pre_ping:  # a connection that went stale: the pool makes another
            return
        why = str(context.original_exception).partition("\n")[0]
        raise LedgerError(f"The ledger cannot be used: {why}.") from None

    return engine


def with_driver(url: URL) -> URL:
    """The URL with our driver for its database. Raises LedgerError where it is a database that we do not know."""
    database = url.drivername.partition("+")[0]
    if database not in DRIVERS:
        raise LedgerError(
            f"FULGURITE_LEDGER: the ledger can be in SQLite or in PostgreSQL, not in {database!r}."
            " A URL is such as postgresql://USER:PASSWORD@HOST/NAME."
        )
    return url.set(drivername=DRIVERS[database])


def check_is_there(url: URL) -> None:
    """Raises LedgerError where the URL is of a file that is not there: SQLite would make it."""
    file = url.database if url.drivername == "sqlite" else None
    if file and not file.startswith("file:") and not os.path.exists(file):
        raise LedgerError(
            f"There is no ledger {file}: the first `fulgurite keys create` or `serve` makes it. "
            "One elsewhere is named by --home, FULGURITE_HOME or FULGURITE_LEDGER."
        )


def on_sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": PATIENCE, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own: `begin` below does
        log_ahead(connection)
        # Every commit reaches the disk: a picture that was delivered stays billed even if the power fails.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes cannot wait for another writer in SQLite: it would fail.
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def on_postgresql(url: URL) -> Engine:
    # libpq's: a host that is gone without a word is noticed in seconds, where TCP would wait for a quarter of an hour.
    patience = {"connect_timeout": 10, "tcp_user_timeout": 10_000}
    patience |= {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2}
    args = {name: value for name, value in patience.items() if name not in url.query}
    # Threads that ask are few and fixed in number, so that each may have a connection instead of waiting for one.
    return create_engine(url, connect_args=args, pool_pre_ping=True, max_overflow=-1)


def log_ahead(connection: sqlite3.Connection) -> None:
    """Readers beside a writer. Connections that open a new file together take turns, for which SQLite does not wait."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def migrate(engine: Engine) -> None:
    """Brings the schema to the newest migration; servers that start together take turns.

    Raises LedgerError where it has one already that this program does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with engine.execution_options(reading=True).connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() == scripts.get_current_head():
            return
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        current = MigrationContext.configure(connection).get_current_revision()
        if current not in {None, *(script.revision for script in scripts.walk_revisions())}:
            raise LedgerError(
                "A newer version of this program has used the ledger: use that one, or a backup from before."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
