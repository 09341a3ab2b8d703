"""The commands about keys and money: ``fulgurite keys ...`` and ``fulgurite usage``. They need no running server."""

import csv
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fulgurite.errors import FulguriteError
from fulgurite.records import MOST_ALLOWED

if TYPE_CHECKING:
    from fulgurite.ledger import Ledger
    from fulgurite.records import Key, Usage

KEY_ID = Annotated[str, typer.Argument(help="The key's id; `fulgurite keys list` shows it.")]
HOME = Annotated[str | None, typer.Option("--home", metavar="PATH", help="The folder where state lives.")]
CARDS = Annotated[
    str | None, typer.Option("--cards", metavar="PATH", help="A folder with the cards of models of your own.")
]
MICRO = 1_000_000
UNBOUNDED = 100_000  # columns, more than any table has


def day(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a day, such as 2027-01-31.") from None


def day_option(help: str) -> Any:
    return typer.Option(parser=day, metavar="YYYY-MM-DD", help=help)


keys = typer.Typer(no_args_is_help=True, help="API keys: who may use the server, and how much.")


@contextmanager
def opened(home: str | None, make: bool = False) -> Iterator["Ledger"]:
    """The ledger; without ``make`` it must be there, so that a mistyped home is no empty table."""
    from fulgurite.ledger import open_ledger
    from fulgurite.settings import read_settings

    ledger = open_ledger(read_settings(home=home), make)
    try:
        yield ledger
    finally:
        ledger.close()


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="For people: whose key it is.")],
    expires: Annotated[datetime | None, day_option("The first day (UTC) it is not valid.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use; may be repeated. Else all.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--rpm", min=1, max=MOST_ALLOWED, help="Requests per minute.")
    ] = None,
    pictures: Annotated[int | None, typer.Option(min=1, max=MOST_ALLOWED, help="Pictures made at once.")] = None,
    credit: Annotated[str | None, typer.Option(help="Dollars it may spend in all, such as 5.00.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may manage keys, and see everyone's usage.")] = False,
    cards: CARDS = None,
    home: HOME = None,
) -> None:
    """Makes a key. Its secret is printed this once, alone on standard output."""
    from fulgurite.cards import add, card
    from fulgurite.records import Limits, now
    from fulgurite.settings import read_settings

    if not name or len(name) > 200:
        raise FulguriteError("NAME: 1 to 200 characters.")
    add(read_settings(cards=cards).cards)
    for asked in model or ():
        card(asked)
    ends = expires.replace(tzinfo=UTC) if expires else None
    if ends and ends <= now():
        raise FulguriteError(f"--expires: on {ends:%Y-%m-%d} the key would have expired already; give a later day.")
    money = micro_dollars(credit) if credit is not None else None
    limits = Limits(ends, tuple(model) if model else None, requests_per_minute, pictures, money)
    with opened(home, make=True) as ledger:
        key, secret = ledger.keys.create(name, limits, admin)
    show_secret(key, secret)


@keys.command("list")
def list_keys(home: HOME = None) -> None:
    """Shows all keys, without their secrets."""
    from fulgurite.records import dollars

    with opened(home) as ledger:
        known = ledger.keys.all()
    rows = [(key.id, key.name, key.prefix, key.state(), what_it_may(key), "$" + dollars(key.spent)) for key in known]
    show_table(("id", "name", "begins", "state", "may", "spent"), rows, whole=("id", "begins", "state"))


@keys.command()
def revoke(key_id: KEY_ID, home: HOME = None) -> None:
    """Ends a key for good; running servers refuse it within a second."""
    with opened(home) as ledger:
        key = ledger.keys.revoke(key_id)
    typer.echo(f"{key.id} ({escaped(key.name)}) is revoked.", err=True)


@keys.command()
def rotate(key_id: KEY_ID, home: HOME = None) -> None:
    """Gives a key another secret, printed this once; the old one ends. Limits and spending stay."""
    with opened(home) as ledger:
        key, secret = ledger.keys.rotate(key_id)
    show_secret(key, secret)


def usage(
    since: Annotated[datetime | None, day_option("The first day (UTC); else 30 days ago.")] = None,
    until: Annotated[datetime | None, day_option("The last day; else today.")] = None,
    key: Annotated[str | None, typer.Option(help="One key's id; else all.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="For spreadsheets; prices in micro-dollars.")] = False,
    home: HOME = None,
) -> None:
    """Shows what was made and what it cost, by day, model and key."""
    from fulgurite.records import days

    if since and until and since > until:
        raise FulguriteError(f"--since: {since:%Y-%m-%d} is after the last day, {until:%Y-%m-%d}.")
    first, end = days(since.date() if since else None, until.date() if until else None)
    with opened(home) as ledger:
        rows = ledger.usage(first, end, key)
        names = {known.id: known.name for known in ledger.keys.all()}  # later, so that every row's is among them
        if key is not None and key not in names:
            raise FulguriteError(f"--key: there is no key {key!r}. `fulgurite keys list` shows the keys.")
    if as_csv:
        write_usage(rows, names)
    else:
        show_usage(rows, names)


def write_usage(rows: Iterable["Usage"], names: Mapping[str, str]) -> None:
    """``names``: the keys' names by their ids."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["day", "model", "key", "name", "pictures", "not_made", "steps", "price_microdollars"])
    for row in rows:
        whose = row.day, row.model, row.key_id, names[row.key_id]
        out.writerow([*whose, row.pictures, row.not_made, row.steps, row.price])


def show_usage(rows: Iterable["Usage"], names: Mapping[str, str]) -> None:
    from fulgurite.records import dollars

    counted = [
        ((str(r.day), r.model, r.key_id, names[r.key_id]), (r.pictures, r.not_made, r.steps, r.price)) for r in rows
    ]
    if counted:
        pictures, not_made, steps, price = map(sum, zip(*(counts for _, counts in counted), strict=True))
        counted.append((("in all", "", "", ""), (pictures, not_made, steps, price)))
    shown = [(*whose, *map(str, counts), "$" + dollars(price)) for whose, (*counts, price) in counted]
    titles = "day", "model", "key", "name", "pictures", "not made", "steps", "price"
    show_table(titles, shown, whole=("day", "model", "key"))


def show_table(titles: Sequence[str], rows: Iterable[Sequence[str]], whole: Collection[str]) -> None:
    """Prints a table of which nothing is cut. Columns that are ``whole`` are not folded either: people copy them."""
    from rich.console import Console, ConsoleDimensions
    from rich.table import Column, Table
    from rich.text import Text

    columns = [Column(title, no_wrap=title in whole, overflow="fold") for title in titles]
    table, console = Table(*columns, box=None), Console()
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))  # a string would be taken for rich's markup
    needed = console.measure(table, options=console.options.update(max_width=UNBOUNDED))
    # A terminal that is too narrow even for folded columns breaks the lines itself; a pipe has no width.
    width = max(console.width, needed.minimum) if sys.stdout.isatty() else needed.maximum
    console.size = ConsoleDimensions(width, console.height)
    console.print(table)


def escaped(text: str) -> str:
    """Text on one line, with nothing in it that a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def show_secret(key: "Key", secret: str) -> None:
    typer.echo(secret)
    typer.echo(f"This is the secret of {key.id} ({escaped(key.name)}), shown this once.", err=True)


def what_it_may(key: "Key") -> str:
    from fulgurite.records import dollars

    limits = key.limits
    models = "" if limits.models is None else f" with {', '.join(limits.models) or 'no model'}"
    parts = [
        f"draw{models}, manage keys" if key.admin else f"draw{models}",
        f"{limits.requests_per_minute} requests/min" if limits.requests_per_minute else "",
        f"{limits.pictures_in_flight} at once" if limits.pictures_in_flight else "",
        f"${dollars(limits.credit)} in all" if limits.credit is not None else "",
        f"until {limits.expires_at:%Y-%m-%d}" if limits.expires_at else "",
    ]
    return "; ".join(part for part in parts if part)


def micro_dollars(text: str) -> int:
    """Dollars as people write them, in whole micro-dollars."""
    try:
        amount = Decimal(text.removeprefix("$")) * MICRO
        if amount.is_finite() and 0 <= amount <= 10**15 and amount == amount.to_integral_value():
            return int(amount)
    except InvalidOperation:
        pass
    raise FulguriteError(f"--credit: {text!r} is not an amount of dollars, such as 5.00, to the millionth.")
