"""The command line. torch, the server and the networks are imported by the commands that need them: help is quick."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fulgurite import __version__
from fulgurite.cli_bench import bench
from fulgurite.cli_ledger import CARDS, escaped, keys, show_table, usage
from fulgurite.cli_serve import serve
from fulgurite.cli_training import train
from fulgurite.errors import FulguriteError, RequestError
from fulgurite.threads import share_cores

if TYPE_CHECKING:
    from fulgurite import Picture, Pipeline, Request
    from fulgurite.parameters import Parameters

SPARK = "fulgurite/spark"
FLAGS = {
    "negative_prompt": "--negative",
    "height": "--size",
    "width": "--size",
    "num_steps": "--steps",
    "guidance": "--guidance",
    "seed": "--seed",
    "decoder": "--decoder",
}


class Commands(TyperGroup):
    """Ends in one line, not a traceback, where the user can do something about it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FulguriteError as error:
            fail(str(error))


def fail(message: str) -> None:
    typer.secho(f"Error: {printable(message)}", fg="red", err=True)
    raise typer.Exit(1)


def printable(text: str) -> str:
    """Text that any terminal takes: arguments may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.add_typer(keys, name="keys")
app.add_typer(train, name="train")
app.command()(serve)
app.command()(usage)
app.command()(bench)


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fulgurite {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Shows the version.")
    ] = False,
) -> None:
    """From a prompt to a picture, on your own machine."""
    share_cores()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")] = Path("output.png"),
    model: Annotated[str, typer.Option(help="The model's id; `fulgurite models` lists them.")] = SPARK,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, 256 to 2048 each; else the model's own.")] = None,
    steps: Annotated[int, typer.Option(help="The most steps to spend, 1 to 20.")] = 20,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same file; else a random one.")] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    guidance: Annotated[float, typer.Option(help="Higher follows the prompt more closely, 0 to 30.")] = 7.5,
    decoder: Annotated[str, typer.Option(help="full, or fast where the model has one: quicker, less exact.")] = "full",
    precision: Annotated[str | None, typer.Option(help="Number format, as in `fulgurite serve`.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many pictures, with seeds counting up.")] = 1,
    cards: CARDS = None,
) -> None:
    """Draws a picture into a file."""
    files = output_files(output, count)
    given = {"prompt": prompt, "negative_prompt": negative, "num_steps": steps, "guidance": guidance}
    given["decoder"] = decoder
    if seed is not None:
        given["seed"] = seed
    if size is not None:
        given["width"], given["height"] = parsed_size(size)
    checked(given)  # before torch is imported: a mistake is told at once

    from fulgurite.cards import add, card
    from fulgurite.engine import Loader
    from fulgurite.parameters import counted_up
    from fulgurite.request import Request, plan
    from fulgurite.settings import read_settings

    settings = read_settings(precision=precision, cards=cards)
    add(settings.cards)
    if size is None:
        given["width"], given["height"] = card(model).usual_size
    first = checked(given)
    plan(card(model), Request(**first.model_dump()))  # what the model cannot do is told before it is loaded
    pipeline = Loader.from_settings(settings)(model, steps)
    for i, file in enumerate(files):
        request = Request(**first.model_dump() | {"seed": counted_up(first.seed, i)})
        save(draw(pipeline, request, f"picture {i + 1} of {count}"), file)


def output_files(output: Path, count: int) -> list[Path]:
    """fox.png, or fox-1.png, fox-2.png and so on. Fails where they cannot be written."""
    if os.path.isdir(output):
        raise FulguriteError(f"--output: {output} is a folder: name a file in it, such as {output / 'output.png'}.")
    if output.suffix.lower() != ".png":
        name = output.with_suffix(".png").name if output.name.lower() != ".png" else "output.png"
        raise FulguriteError(f"--output: pictures are PNG files: name it {name}.")
    for folder in (*reversed(output.parent.parents), output.parent):
        if not os.path.isdir(folder):
            raise FulguriteError(f"--output: there is no folder {folder}.")
    files = [output.with_name(f"{output.stem}-{i + 1}{output.suffix}") for i in range(count)] if count > 1 else [output]
    for file in files:
        try_to_write(file)
    return files


def try_to_write(file: Path) -> None:
    """Opens the file as if to write it, and leaves it as it was: whether that works, nothing else tells for sure."""
    try:
        is_there = file.exists()
        file.open("ab").close()
        if not is_there:
            file.resolve().unlink()  # of a link to nothing, what it links to
    except OSError as error:
        raise FulguriteError(f"--output: cannot write {file}: {error.strerror}.") from None


def parsed_size(size: str) -> tuple[int, int]:
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(size) < 20):
        raise FulguriteError(f"--size: {size!r} is not WIDTHxHEIGHT, such as 512x512.")
    return int(width), int(height)


def checked(given: dict[str, Any]) -> "Parameters":
    """The parameters within the bounds of the API, or an error that names the flag."""
    from fulgurite.parameters import within_bounds

    try:
        return within_bounds(given)
    except RequestError as error:
        message = str(error).removeprefix(f"{error.param}: ")
        raise FulguriteError(f"{FLAGS.get(error.param, error.param)}: {message}") from None


def draw(pipeline: "Pipeline", request: "Request", title: str) -> "Picture":
    """Draws, showing each step on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=None)
        return pipeline.draw(request, lambda done, steps, _: progress.update(task, completed=done, total=steps))


def save(picture: "Picture", file: Path) -> None:
    """Writes the file and says so: its path on standard output, for scripts; the rest beside it, for people."""
    from fulgurite.picture_file import png_bytes

    request = picture.request
    try:
        file.write_bytes(png_bytes(picture))
    except OSError as error:
        again = f"--seed {request.seed} draws the same picture again"
        raise FulguriteError(f"Cannot write {file}: {error.strerror}. {again}.") from None
    typer.echo(printable(str(file)))
    how = f"{request.width}x{request.height}, {picture.steps} steps, {request.decoder} decoder, seed {request.seed}"
    typer.secho("; ".join([f"  {how}, {picture.model}, {picture.seconds:.1f} s", *picture.notes]), dim=True, err=True)


@app.command()
def settings() -> None:
    """Prints every setting in force, and where it came from."""
    from fulgurite.settings import read_settings, settings_file

    in_force, file = read_settings(), settings_file()
    for name, value in in_force:
        shown = ", ".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        typer.echo(escaped(f"{name:<17} {shown:<32} {in_force.origin(name)}"))
    typer.echo(escaped(f"The settings' file {file} {'was read' if file.exists() else 'is not there'}."))


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="The model's id; `fulgurite models` lists them.")],
    steps: Annotated[str | None, typer.Option(help="The schedules to pull, such as 2,4; else all.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="The small LoRA files, on SDXL's own UNet.")] = False,
    cards: CARDS = None,
) -> None:
    """Downloads a model's weights from the hub, into the hub's own cache."""
    from fulgurite.cards import add, card
    from fulgurite.settings import read_settings
    from fulgurite.weights import hub

    add(read_settings(cards=cards).cards)
    of_model = card(model)
    asked = steps.split(",") if steps else list(of_model.weights.loras if lora else of_model.weights.unets)
    if not all(n.strip().isdecimal() for n in asked):
        raise FulguriteError(f"--steps: {steps!r} is not a list of numbers, such as 2,4.")
    hub.pull(of_model, tuple(int(n) for n in asked), use_lora=lora)


@app.command()
def models(cards: CARDS = None) -> None:
    """Lists the models there are."""
    from fulgurite.cards import add
    from fulgurite.cards import cards as known
    from fulgurite.parameters import MOST_STEPS
    from fulgurite.settings import read_settings

    add(read_settings(cards=cards).cards)
    where = {"embedded": "inside the package", "hub": "on the hub: pull them"}
    rows = [
        (card.id, ", ".join(map(str, card.schedules)) or f"1 to {MOST_STEPS}", where.get(card.weights.source, "here"))
        for card in known().values()
    ]
    show_table(("id", "steps", "weights"), rows, whole=("id",))
