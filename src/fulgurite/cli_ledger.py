"""The commands about keys and money: ``fulgurite keys ...`` and ``fulgurite usage``. They need no running server."""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated

import typer

from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from rich.table import Column

    from fulgurite.ledger import Ledger
    from fulgurite.records import Key

KEY_ID = Annotated[str, typer.Argument(help="The key's id; `fulgurite keys list` shows it.")]
MICRO = 1_000_000

keys = typer.Typer(no_args_is_help=True, help="API keys: who may use the server, and how much.")


@contextmanager
def opened() -> Iterator["Ledger"]:
    from fulgurite.ledger import open_ledger
    from fulgurite.settings import read_settings

    ledger = open_ledger(read_settings())
    try:
        yield ledger
    finally:
        ledger.close()


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="For people: whose key it is.")],
    expires: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The first day (UTC) it is not valid.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use; may be repeated. Else all.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option("--rpm", min=1, help="Requests per minute.")] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="Pictures made at once.")] = None,
    credit: Annotated[str | None, typer.Option(help="Dollars it may spend in all, such as 5.00.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may manage keys, and see everyone's usage.")] = False,
) -> None:
    """Makes a key. Its secret is printed this once, alone on standard output."""
    from fulgurite.cards import add, card
    from fulgurite.records import Limits
    from fulgurite.settings import read_settings

    if not name or len(name) > 200:
        raise FulguriteError("NAME: 1 to 200 characters.")
    add(read_settings().cards)
    for asked in model or ():
        card(asked)
    ends = expires.replace(tzinfo=UTC) if expires else None
    money = micro_dollars(credit) if credit is not None else None
    limits = Limits(ends, tuple(model) if model else None, requests_per_minute, pictures, money)
    with opened() as ledger:
        key, secret = ledger.keys.create(name, limits, admin)
    show_secret(key, secret)


@keys.command("list")
def list_keys() -> None:
    """Shows all keys, without their secrets."""
    from rich.console import Console
    from rich.table import Table

    from fulgurite.records import dollars

    with opened() as ledger:
        known = ledger.keys.all()
    table = Table(whole("id"), "name", whole("begins"), whole("state"), "may", "spent", box=None)
    for key in known:
        spent = "$" + dollars(key.spent)
        if key.limits.credit is not None:
            spent += " of $" + dollars(key.limits.credit)
        table.add_row(key.id, key.name, key.prefix, key.state(), what_it_may(key), spent)
    Console().print(table)


@keys.command()
def revoke(key_id: KEY_ID) -> None:
    """Ends a key for good; running servers refuse it within a second."""
    with opened() as ledger:
        key = ledger.keys.revoke(key_id)
    typer.echo(f"{key.id} ({key.name}) is revoked.", err=True)


@keys.command()
def rotate(key_id: KEY_ID) -> None:
    """Gives a key another secret, printed this once; the old one ends. Limits and spending stay."""
    with opened() as ledger:
        key, secret = ledger.keys.rotate(key_id)
    show_secret(key, secret)


def usage(
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The first day (UTC); else 30 days ago.")
    ] = None,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day; else today.")] = None,
    key: Annotated[str | None, typer.Option(help="One key's id; else all.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="For spreadsheets; prices in micro-dollars.")] = False,
) -> None:
    """Shows what was made and what it cost, by day, model and key."""
    from fulgurite.records import days, dollars

    first, end = days(since.date() if since else None, until.date() if until else None)
    with opened() as ledger:
        rows = ledger.usage(first, end, key)
    if as_csv:
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(["day", "model", "key", "pictures", "not_made", "steps", "price_microdollars"])
        out.writerows(
            [row.day, row.model, row.key_id, row.pictures, row.not_made, row.steps, row.price] for row in rows
        )
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(whole("day"), "model", whole("key"), "pictures", "not made", "steps", "price", box=None)
    for row in rows:
        counts = str(row.pictures), str(row.not_made), str(row.steps)
        table.add_row(str(row.day), row.model, row.key_id, *counts, "$" + dollars(row.price))
    table.add_section()
    total = [sum(values) for values in zip(*((r.pictures, r.not_made, r.steps, r.price) for r in rows), strict=True)]
    if rows:
        table.add_row("in all", "", "", *map(str, total[:3]), "$" + dollars(total[3]))
    Console().print(table)


def whole(title: str) -> "Column":
    """A column whose words are never cut, however narrow the terminal: people copy them."""
    from rich.table import Column

    return Column(title, no_wrap=True, min_width=len(title), overflow="ignore")


def show_secret(key: "Key", secret: str) -> None:
    typer.echo(secret)
    typer.echo(f"This is the secret of {key.id} ({key.name}), shown this once.", err=True)


def what_it_may(key: "Key") -> str:
    limits = key.limits
    parts = [
        "manage keys" if key.admin else "",
        f"{limits.requests_per_minute} requests/min" if limits.requests_per_minute else "",
        f"{limits.pictures_in_flight} at once" if limits.pictures_in_flight else "",
        ", ".join(limits.models) if limits.models is not None else "",
        f"until {limits.expires_at:%Y-%m-%d}" if limits.expires_at else "",
    ]
    return "; ".join(part for part in parts if part) or "anything"


def micro_dollars(text: str) -> int:
    """Dollars as people write them, in whole micro-dollars."""
    try:
        amount = Decimal(text.removeprefix("$")) * MICRO
        if amount.is_finite() and 0 <= amount <= 10**15 and amount == amount.to_integral_value():
            return int(amount)
    except InvalidOperation:
        pass
    raise FulguriteError(f"--credit: {text!r} is not an amount of dollars, such as 5.00, to the millionth.")
