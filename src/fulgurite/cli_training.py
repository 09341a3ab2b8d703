"""`fulgurite train`: the small model from nothing, its students of few steps, and what they are worth."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from fulgurite.training.loop import Run
    from fulgurite.training.recipe import Preset

train = typer.Typer(no_args_is_help=True, help="Trains, distils and evaluates the small model.")
EMBEDDED = Path(str(resources.files("fulgurite") / "embedded"))

Work = Annotated[Path, typer.Argument(help="A folder for data and checkpoints; a run that stopped goes on there.")]
Named = Annotated[str, typer.Option("--preset", help="How much of everything: cpu or gpu.")]
Minutes = Annotated[float, typer.Option(min=0.1, help="Stops after so many; the same command goes on there.")]
Prompts = Annotated[int, typer.Option(min=100, help="How many held-out captions are drawn.")]
Model = Annotated[Path, typer.Option(help="The undistilled model's folder; else the one inside the package.")]


def checked(preset: str) -> "Preset":
    """The preset of this name, on a machine that has what training needs."""
    if find_spec("resvg_py") is None:
        raise FulguriteError("Training needs more packages: in the checkout, pip install -e '.[train]'.")
    if shutil.which("npm") is None:
        raise FulguriteError("Training fetches its pictures with npm, which is not installed here.")
    from fulgurite.training.recipe import PRESETS

    if preset not in PRESETS:
        raise FulguriteError(f"--preset: there is no {preset!r}; there are {' and '.join(PRESETS)}.")
    return PRESETS[preset]


@contextmanager
def timed(device: str, minutes: float) -> Iterator["Run"]:
    """What a run may use. Exits with 3 where its time was not enough, so that a script knows to start it again."""
    from accelerate import PartialState

    from fulgurite.training.loop import Run, TimeIsUpError

    here = str(PartialState(cpu=device == "cpu").device)
    try:
        yield Run(here, time.monotonic() + 60 * minutes)
        # Together: of several processes one that ended while another still wrote a file now and then aborted.
        PartialState().wait_for_everyone()
    except TimeIsUpError as error:
        typer.echo(f"{error} The same command goes on there.")
        raise typer.Exit(3) from error
    finally:
        PartialState().destroy_process_group()


def processes() -> int:
    """How many this run has: more than one by torchrun or accelerate launch."""
    from accelerate import PartialState

    return PartialState().num_processes


@train.command()
def recipe(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the weights go; the students' beside it.")] = Path("spark"),
    prompts: Prompts = 2000,
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Trains the small model from nothing, distils and evaluates it, by the recipe of the one inside the package."""
    amounts = checked(preset)
    from accelerate import PartialState

    from fulgurite.training.recipe import UNET_FILE, evaluate_in
    from fulgurite.training.recipe import train as run_stages
    from fulgurite.training.students import students_in

    students = out.with_name(f"{out.name}-lightning")
    with timed(amounts.device, minutes) as run:
        run_stages(work, out, amounts, run)
        if processes() == 1:
            evaluate_in(work, out, students_in(students, out / UNET_FILE), amounts, prompts, run)
        elif PartialState().is_main_process:
            command = f"fulgurite train evaluate {work} --model {out} --students {students} --preset {preset}"
            typer.echo(f"Trained. What came of it, by one process: {command}")


@train.command()
def distil(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the students' LoRA files go.")] = Path("spark-lightning"),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Distils a finished small model into students of 8, 4, 2 and 1 steps."""
    amounts = checked(preset)
    from fulgurite.training.recipe import distil_from

    with timed(amounts.device, minutes) as run:
        distil_from(work, model, out, amounts, run)


@train.command()
def decoder(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the folders vae and fast_decoder go.")] = Path("spark-decoders"),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Teaches a finished small model's decoder what its UNet draws, and a fast decoder from it."""
    amounts = checked(preset)
    from fulgurite.training.recipe import decoders_from

    with timed(amounts.device, minutes) as run:
        decoders_from(work, model, out, amounts, run)


@train.command()
def fast_decoder(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the folder fast_decoder goes.")] = Path("spark-decoders"),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Distils a finished small model's VAE into a decoder that is several times quicker."""
    amounts = checked(preset)
    from fulgurite.training.recipe import fast_decoder_from

    with timed(amounts.device, minutes) as run:
        fast_decoder_from(work, model, out, amounts, run)


@train.command()
def evaluate(
    work: Work,
    students: Annotated[Path | None, typer.Option(help="A folder of students; else those inside the package.")] = None,
    model: Model = EMBEDDED / "spark",
    prompts: Prompts = 2000,
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Prints how often an encoder of pictures and captions finds what was asked for, and how real pictures look."""
    amounts = checked(preset)
    from fulgurite.training.recipe import UNET_FILE, evaluate_in, students_inside
    from fulgurite.training.students import students_in

    with timed(amounts.device, minutes) as run:
        if processes() > 1:
            raise FulguriteError("Evaluation is for one process: run it without torchrun or accelerate launch.")
        found = students_in(students, model / UNET_FILE) if students else students_inside()
        evaluate_in(work, model, found, amounts, prompts, run)


@train.command()
def distil_sdxl(
    work: Work,
    model: Annotated[Path, typer.Option(help="SDXL's base model: its folder as diffusers publishes it.")],
    pictures: Annotated[Path, typer.Option(help="A folder of pictures, a caption beside each: fox.jpg, fox.txt.")],
    out: Annotated[Path, typer.Option(help="Where the students' files go.")] = Path("sdxl-lightning"),
    minutes: Minutes = inf,
) -> None:
    """Distils SDXL itself, on one GPU or, by accelerate launch, on many."""
    from fulgurite.training.sdxl import distil_sdxl as run_stages

    with timed("cuda", minutes) as run:
        run_stages(work, model, pictures, out, run)
