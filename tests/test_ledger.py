"""The ledger, the same tests on SQLite and on PostgreSQL."""

import random
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from conftest import SPARK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, event, func, select

from fulgurite.errors import CreditSpentError, LedgerError, UnknownKeyError
from fulgurite.ledger import Ledger, open_ledger
from fulgurite.ledger.database import connect, log_ahead
from fulgurite.ledger.tables import answers, metadata
from fulgurite.records import Answer, Entry, Key, Limits, Usage, now
from fulgurite.settings import read_settings

PRICE = 1100


@pytest.fixture
def opened(database_url: str) -> Iterator[Callable[[], Ledger]]:
    """Opens the same database as often as asked, as several servers do."""
    ledgers: list[Ledger] = []

    def open_one() -> Ledger:
        ledgers.append(Ledger(database_url))
        return ledgers[-1]

    yield open_one
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def books(opened: Callable[[], Ledger]) -> Ledger:
    return opened()


def entry(key: Key, **different: object) -> Entry:
    made = Entry(uuid.uuid4().hex, key.id, now(), SPARK, 20, 8, 256, 320, 2**64 - 1, 0.5, 1.25, PRICE, "done")
    return replace(made, **different)


def answer(of: Entry, idempotency_key: str | None, **different: object) -> Answer:
    headers = {"X-Fulgurite-Seed": "7"}
    kept = now() + timedelta(hours=1)
    made = Answer(of.request_id, of.key_id, idempotency_key, "b" * 64, "image/png", headers, b"\x89PNG\0", kept)
    return replace(made, **different)


def key_of(ledger: Ledger, key: Key) -> Key:
    return next(known for known in ledger.keys.all() if known.id == key.id)


def to_milliseconds(entry: Entry) -> Entry:
    return replace(entry, at=entry.at.replace(microsecond=entry.at.microsecond // 1000 * 1000))


def test_an_entry_is_kept_to_the_last_digit_and_charged(books: Ledger) -> None:
    key, _ = books.keys.create("a customer")
    made, failed = entry(key), entry(key, outcome="failed", price=0, steps_run=0)
    assert books.settle(made).result(10) is None
    assert books.settle(failed).result(10) is None
    assert sorted(books.entries(key.id), key=lambda e: e.outcome) == [to_milliseconds(made), to_milliseconds(failed)]
    assert key_of(books, key).spent == PRICE
    assert books.entries("key_of_another") == []


def test_usage_is_by_utc_day_model_and_key(books: Ledger) -> None:
    a, b = (books.keys.create(name)[0] for name in "ab")
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    just_before = midnight - timedelta(milliseconds=1)
    for made in (
        entry(a, at=just_before),
        entry(a, at=midnight),
        entry(a, at=midnight, steps_run=2, price=3),
        entry(a, at=midnight, outcome="cancelled", price=0),
        entry(a, at=midnight, model="another", outcome="refused", price=0, steps_run=0),
        entry(b, at=midnight + timedelta(hours=23)),
        entry(b, at=midnight + timedelta(days=1)),
    ):
        books.settle(made).result(10)
    first, second = just_before.date(), midnight.date()
    of_a = [
        Usage(first, SPARK, a.id, 1, 0, 8, PRICE),
        Usage(second, "another", a.id, 0, 1, 0, 0),
        Usage(second, SPARK, a.id, 2, 1, 10, PRICE + 3),
    ]
    until = midnight + timedelta(days=1)
    assert books.usage(just_before, until, a.id) == of_a
    everyone = [*of_a, Usage(second, SPARK, b.id, 1, 0, 8, PRICE)]
    assert sorted(books.usage(just_before, until), key=str) == sorted(everyone, key=str)
    assert books.usage(until + timedelta(days=1), until + timedelta(days=9)) == []


def test_the_first_answer_is_given_again_and_billed_once(books: Ledger) -> None:
    key, _ = books.keys.create("a")
    other, _ = books.keys.create("b")
    first = entry(key)
    kept = answer(first, "order-1")
    assert books.settle(first, kept).result(10) is kept
    second = entry(key)
    again = books.settle(second, answer(second, "order-1", content=b"other")).result(10)
    assert again
    assert (again.id, again.content, again.headers) == (kept.id, kept.content, kept.headers)
    assert books.answer(key.id, idempotency_key="order-1") == again
    assert key_of(books, key).spent == PRICE
    assert [(e.price, e.outcome) for e in books.entries()] == [(PRICE, "done"), (0, "refused")]
    # The same words from another key are another order.
    assert books.answer(other.id, idempotency_key="order-1") is None
    third = entry(other)
    assert books.settle(third, answer(third, "order-1")).result(10).id == third.request_id
    assert key_of(books, other).spent == PRICE


def test_answers_are_forgotten_when_they_expire(books: Ledger) -> None:
    key, _ = books.keys.create("a")
    first, second = entry(key), entry(key)
    books.settle(first, answer(first, "k", expires_at=now() - timedelta(seconds=1))).result(10)
    assert books.answer(key.id, idempotency_key="k") is None
    assert books.settle(second, answer(second, "k")).result(10).id == second.request_id
    assert key_of(books, key).spent == 2 * PRICE


def test_two_servers_settle_one_idempotency_key_at_once(opened: Callable[[], Ledger]) -> None:
    ledgers = [opened(), opened()]
    key, _ = ledgers[0].keys.create("a")
    for round_number in range(10):
        made = [entry(key) for _ in range(8)]
        settlements = [
            ledgers[i % 2].settle(one, answer(one, f"order-{round_number}", content=one.request_id.encode()))
            for i, one in enumerate(made)
        ]
        assert len({settlement.result(30).content for settlement in settlements}) == 1
        assert key_of(ledgers[0], key).spent == PRICE * (round_number + 1)
    assert sum(e.price for e in ledgers[0].entries()) == 10 * PRICE


def test_two_servers_never_spend_more_than_the_credit(opened: Callable[[], Ledger]) -> None:
    ledgers = [opened(), opened()]
    keys = [ledgers[0].keys.create(name, Limits(credit=10 * PRICE + 5))[0] for name in "ab"]
    settlements = [ledgers[i % 2].settle(entry(keys[i // 2 % 2])) for i in range(80)]
    errors = [settlement.exception(30) for settlement in settlements]
    assert sum(error is None for error in errors) == 20
    assert all(error is None or isinstance(error, CreditSpentError) for error in errors)
    for key in keys:
        assert key_of(ledgers[0], key).spent == 10 * PRICE
        assert sum(e.price for e in ledgers[0].entries(key.id)) == 10 * PRICE


@st.composite
def histories(draw: st.DrawFn) -> tuple[int | None, list[tuple[int, str, str | None]]]:
    outcome = st.sampled_from(["done", "done", "failed", "cancelled"])
    idempotency_key = st.none() | st.sampled_from(["x", "y"])
    steps = st.lists(st.tuples(st.integers(0, 5000), outcome, idempotency_key), max_size=20)
    return draw(st.none() | st.integers(0, 20_000)), draw(steps)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories())
def test_spending_is_the_sum_of_the_entries(books: Ledger, history: tuple[int | None, list]) -> None:
    """Whatever comes, one by one or in one commit, against a model of the books in four lines."""
    credit, steps = history
    key, _ = books.keys.create("a", Limits(credit=credit))
    spent, given_before = 0, set()
    settlements = []
    for price, outcome, name in steps:
        one = entry(key, price=price if outcome == "done" else 0, outcome=outcome)
        kept = answer(one, name) if name and outcome == "done" else None
        settlements.append(books.settle(one, kept))
        if (kept and name in given_before) or (credit is not None and spent + one.price > credit):
            continue
        spent += one.price
        given_before |= {name} if kept else set()
    for settlement in settlements:
        assert settlement.exception(10) is None or isinstance(settlement.exception(), CreditSpentError)
    assert key_of(books, key).spent == spent == sum(e.price for e in books.entries(key.id))
    assert len(books.entries(key.id)) == len(steps)


def test_one_settlement_that_fails_takes_no_other_with_it(books: Ledger) -> None:
    key, _ = books.keys.create("a")
    first = entry(key)
    books.settle(first).result(10)
    with books._engine.begin():  # holds SQLite's only writer, so that all of these come into one commit
        good = [entry(key) for _ in range(20)]
        bad = [replace(first, at=first.at - timedelta(seconds=1)), entry(replace(key, id="nobody"))]
        settlements = [books.settle(one) for one in random.sample(good + bad, 22)]
    failed = {s.entry.request_id for s in settlements if isinstance(s.exception(30), LedgerError)}
    assert failed == {one.request_id for one in bad}
    assert key_of(books, key).spent == 21 * PRICE
    assert len(books.entries()) == 21


def test_a_commit_whose_reply_was_lost_is_not_taken_back(books: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = books.keys.create("a")
    commit, lost = books._commit, []

    def lossy(batch: list) -> list:
        results = commit(batch)
        if not lost:
            lost.append(len(batch))
            raise LedgerError("The connection is gone.")
        return results

    monkeypatch.setattr(books, "_commit", lossy)
    with books._engine.begin():
        ends = [entry(key) for _ in range(5)]
        settlements = [books.settle(one, answer(one, "order")) if one is ends[0] else books.settle(one) for one in ends]
    assert [settlement.result(30) for settlement in settlements] == [settlements[0].answer] + [None] * 4
    assert lost
    assert key_of(books, key).spent == 5 * PRICE
    assert len(books.entries()) == 5

    lost.clear()
    again = entry(key)
    assert books.settle(again, answer(again, "order")).result(30).id == ends[0].request_id
    lost.clear()
    poor, _ = books.keys.create("b", Limits(credit=PRICE - 1))
    assert isinstance(books.settle(entry(poor)).exception(30), CreditSpentError)
    assert [len(lost), key_of(books, key).spent, key_of(books, poor).spent] == [1, 5 * PRICE, 0]


def test_keys_open_by_their_secret_alone(books: Ledger) -> None:
    limits = Limits(now().replace(microsecond=0) + timedelta(days=1), (SPARK,), 60, 2, 5_000_000)
    key, secret = books.keys.create("Zoë's app", limits, admin=True)
    assert books.keys.find(secret) == key_of(books, key)
    assert books.keys.find(secret).limits == limits
    assert secret.startswith(key.prefix)
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), key.id, key.prefix, "\udcff"):
        assert books.keys.find(wrong) is None
    replaced, new_secret = books.keys.rotate(key.id)
    assert replaced.limits == limits
    assert books.keys.find(secret) is None
    assert books.keys.find(new_secret).id == key.id
    assert books.keys.revoke(key.id).state() == "revoked"
    assert books.keys.find(new_secret).state() == "revoked"
    for change in (books.keys.revoke, books.keys.rotate):
        with pytest.raises(UnknownKeyError, match="fulgurite keys list"):
            change(key.id)
    _, secret = books.keys.create("old", Limits(expires_at=now() - timedelta(seconds=1)))
    assert books.keys.find(secret).state() == "expired"


def test_a_key_that_changed_here_is_not_remembered(books: Ledger) -> None:
    key, secret = books.keys.create("a")
    assert books.keys.remembered(secret) is None
    assert books.keys.find(secret) == books.keys.remembered(secret)
    books.keys.revoke(key.id)
    assert books.keys.remembered(secret) is None
    _, with_credit = books.keys.create("b", Limits(credit=5))
    books.keys.find(with_credit)
    assert books.keys.remembered(with_credit) is None  # what it has spent must be fresh


def test_the_operators_own_key_follows_the_environment(books: Ledger) -> None:
    for secret in ("first", "second", "second"):
        books.keys.set_from_environment(secret)
        assert books.keys.find(secret).state() == "active"
    assert books.keys.find("first") is None
    books.keys.set_from_environment(None)
    assert books.keys.find("second").state() == "revoked"
    books.keys.set_from_environment("third")
    assert books.keys.find("third").state() == "active"
    assert len(books.keys.all()) == 1


def test_the_environment_holds_no_secret_of_a_key_that_was_made(books: Ledger) -> None:
    """Else it would open everything, for ever, once that key is given another."""
    books.keys.set_from_environment("its own")
    key, secret = books.keys.create("first")
    for state in ("active", "revoked"):
        with pytest.raises(LedgerError, match=f"FULGURITE_API_KEY is the secret of the key {key.id} .{state}.: unset"):
            books.keys.set_from_environment(secret)
        assert books.keys.find("its own").state() == "active"
        if state == "active":
            books.keys.revoke(key.id)


def test_no_secret_is_in_the_database(opened: Callable[[], Ledger]) -> None:
    books = opened()
    _, secret = books.keys.create("a")
    with books._engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM keys").all()
    assert secret not in str(rows)
    assert secret[:11] in str(rows)


def test_a_ledger_that_a_newer_program_has_used_is_left_alone(database_url: str) -> None:
    Ledger(database_url).close()
    engine = connect(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(LedgerError, match="newer version of this program"):
        Ledger(database_url)


def test_the_migrations_make_the_tables_that_the_code_uses(books: Ledger) -> None:
    with books._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_connections_that_open_a_new_file_together_wait_for_each_other(tmp_path: Path) -> None:
    """SQLite itself waits for a lock, but not to change the journal's mode: in a few of hundreds it fails at once."""
    with closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(0.2, other.execute, ["COMMIT"]).start()
        with closing(sqlite3.connect(tmp_path / "new.db", timeout=0, isolation_level=None)) as connection:
            log_ahead(connection)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_servers_that_start_together_make_one_schema(opened: Callable[[], Ledger]) -> None:
    failures = []

    def start() -> None:
        try:
            opened().keys.create("a")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(opened().keys.all()) == 4


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("not a url", "FULGURITE_LEDGER is not a database's URL"),
        ("nothing://secret-word@host/x", "in SQLite or in PostgreSQL, not in 'nothing'"),
        ("mysql://user:secret-word@host/x", "in SQLite or in PostgreSQL, not in 'mysql'"),
        ("postgresql://user:secret-word@host:port/x", "FULGURITE_LEDGER is not a database's URL"),
        ("postgresql://user:secret-word@127.0.0.1:1/x", r"Cannot open the ledger postgresql.*:\*\*\*@127.0.0.1"),
        ("sqlite:////nowhere/at/all.db", "Cannot open the ledger sqlite:////nowhere/at/all.db: unable to open"),
    ],
)
def test_a_ledger_that_cannot_be_opened_says_why_and_no_secret(url: str, said: str) -> None:
    with pytest.raises(LedgerError, match=said) as caught:
        Ledger(url)
    assert "secret-word" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "sqlite+pysqlite"])
def test_the_driver_is_ours_whichever_the_url_names(driver: str, tmp_path: Path) -> None:
    books = Ledger(f"{driver}:///{tmp_path / 'x.db'}")
    books.close()
    assert (tmp_path / "x.db").exists()


def test_a_home_that_cannot_be_written_to_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != home)  # whoever runs this: root may write anywhere
    with pytest.raises(
        LedgerError, match=f"^Cannot keep the ledger in {home}: it cannot be written to\\. Name another"
    ):
        open_ledger(read_settings())


def test_what_is_not_to_be_made_must_be_there(tmp_path: Path, postgresql_server: str) -> None:
    """But for a server's database, which cannot be made by opening it."""
    with pytest.raises(LedgerError, match=r"There is no ledger .*x\.db: "):
        Ledger(f"sqlite:///{tmp_path / 'x.db'}", make=False)
    assert not (tmp_path / "x.db").exists()
    Ledger(postgresql_server.format("postgres"), make=False).close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match=r"x.db: file is not a database"):
        Ledger(f"sqlite:///{tmp_path / 'x.db'}")


def test_connections_that_the_database_dropped_are_made_anew(postgresql_server: str) -> None:
    """As after its restart, or behind a firewall that forgets idle ones."""
    books = Ledger(postgresql_server.format("postgres"))
    try:
        books.keys.create("first")
        with psycopg.connect(postgresql_server.format("postgres"), autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert [key.name for key in books.keys.all()] == ["first"]
    finally:
        books.close()


def test_a_database_that_fails_later_is_an_error_that_says_why(books: Ledger) -> None:
    """Whatever is asked of it; and a settlement says so too, in its future."""
    key, secret = books.keys.create("a")
    with books._engine.begin() as connection:
        for table in ("answers", "entries", "keys"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
    for ask in (
        lambda: books.keys.find(secret),
        books.keys.all,
        lambda: books.keys.create("b"),
        lambda: books.keys.revoke(key.id),
        lambda: books.answer(key.id, "x"),
        lambda: books.usage(now(), now()),
        lambda: books.settle(entry(key)).result(10),
    ):
        with pytest.raises(LedgerError, match="The ledger cannot be used: "):
            ask()


def test_a_full_disk_is_found_by_what_could_not_be_written_and_left_behind(tmp_path: Path) -> None:
    with closing(Ledger(f"sqlite:///{tmp_path / 'books.db'}")) as books:
        key, _ = books.keys.create("a")
        most_pages = 1  # SQLite takes those it has already for the least

        @event.listens_for(books._engine, "begin")
        def fill(connection: Connection) -> None:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {most_pages}")

        books.check()  # which writes nothing unless it has a reason
        made = entry(key)
        for _ in range(2):
            with pytest.raises(LedgerError, match="disk is full"):
                books.settle(made, answer(made, "once", content=bytes(100_000))).result(10)
            with pytest.raises(LedgerError, match="disk is full"):
                books.check()
        most_pages = 1_000_000
        books.check()
        with books._engine.begin() as connection:
            assert connection.execute(select(func.count()).select_from(answers)).scalar() == 0
        most_pages = 1
        books.check()  # as long as nothing has failed again


def test_a_database_that_is_away_is_found(postgresql_server: str) -> None:
    name = "t" + uuid.uuid4().hex
    with psycopg.connect(postgresql_server.format("postgres"), autocommit=True) as other:
        other.execute(f"CREATE DATABASE {name}")
        with closing(Ledger(postgresql_server.format(name))) as books:
            books.check()
            other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            other.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            with pytest.raises(LedgerError, match="not currently accepting connections"):
                books.check()
            other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            books.check()
