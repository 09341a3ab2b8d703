"""`fulgurite train`: the small model from nothing, its students of few steps, and their scores."""

import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import resources
from importlib.util import find_spec
from math import inf
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer

from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from fulgurite.training.loop import Run
    from fulgurite.training.recipe import Preset

train = typer.Typer(no_args_is_help=True, help="Trains, distils and evaluates the small model.")
EMBEDDED = Path(str(resources.files("fulgurite") / "embedded"))
# How long processes wait for one another: the first alone makes the scenes and writes checkpoints, and shares of
# pictures are not done at the same time. By torch's own measure, on GPUs 10 minutes, a run would end there.
PATIENCE = timedelta(days=1)

Work = Annotated[Path, typer.Argument(help="A folder for data and checkpoints; a run that stopped goes on there.")]
Named = Annotated[str, typer.Option("--preset", help="How much of everything: cpu or gpu.")]
Minutes = Annotated[
    float,
    typer.Option(
        min=0.1,
        help="Stops training after so many; the same command resumes. Fetching and loading are not cut short.",
    ),
]
Prompts = Annotated[int, typer.Option(min=100, help="How many captions of held-out scenes are drawn.")]
Model = Annotated[Path, typer.Option(help="The undistilled model's folder; else the one inside the package.")]


def checked(work: Path, preset: str, outs: Iterable[Path]) -> "Preset":
    """The preset of this name, on a machine that has what training needs, in a folder that no other preset has.

    ``outs``: the folders that --out stands for.
    """
    needed("resvg_py")
    from fulgurite.training.recipe import PRESETS

    if preset not in PRESETS:
        raise FulguriteError(f"--preset: there is no {preset!r}; there are {' and '.join(PRESETS)}.")
    writable("WORK", work)
    for other in PRESETS.keys() - {preset}:
        if (work / f"preset-{other}").exists():
            raise FulguriteError(f"{work} holds what the preset {other} made: give {preset} a folder of its own.")
    for out in outs:
        writable("--out", out)
    (work / f"preset-{preset}").touch()
    return PRESETS[preset]


def writable(name: str, folder: Path) -> None:
    """Makes the folder, if need be, and a file in it that does not stay: nothing else tells for sure that it works.

    Raises FulguriteError with the name of the argument.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise FulguriteError(f"{name}: {folder} is a file, and should be a folder.") from None
    except OSError as error:
        raise FulguriteError(f"{name}: cannot write into the folder {folder}: {error.strerror}.") from None


def with_cards(out: Path) -> tuple[Path, ...]:
    """The folder of --out and the one that holds it, where the cards go."""
    if out.name in ("", ".."):
        raise FulguriteError(f"--out: {out} has no name, which the card beside it needs: name a folder in it.")
    return out, out.parent


def apart(out: Path, model: Path) -> None:
    if out.resolve() == model.resolve():
        raise FulguriteError("--out: name another folder than the model's, which is what the run begins with.")


def needed(package: str) -> None:
    if find_spec(package) is None:
        raise FulguriteError("Training needs more packages: in the checkout, pip install -e '.[train]'.")


@contextmanager
def timed(device: str, minutes: float) -> Iterator["Run"]:
    """What a run may use. Exits with 3 where its time was not enough, so that a script knows to start it again."""
    needed("accelerate")
    # Imported later, its functions' defaults would hold the group of processes for good, and so its threads stay: one
    # that lets go of a tensor while Python ends aborts the process.
    import torch.distributed.nn  # noqa: F401
    from accelerate import PartialState

    from fulgurite.training.loop import Run, TimeIsUpError

    state, late = PartialState(cpu=device == "cpu", timeout=PATIENCE), ""
    try:
        if device == "cuda" and state.device.type == "cpu":
            raise FulguriteError("This is for a GPU, and torch finds none here.")
        try:
            yield Run(str(state.device), time.monotonic() + 60 * minutes)
        except TimeIsUpError as error:
            late = str(error)
        # Together: where one ends before the others torchrun may end them, and the first still writes a checkpoint.
        state.wait_for_everyone()
    finally:
        state.destroy_process_group()
    if late:
        if state.is_main_process:
            typer.echo(f"{late} The same command goes on there.")
        raise typer.Exit(3)


@contextmanager
def started(work: Path, preset: str, minutes: float, *outs: Path) -> Iterator[tuple["Preset", "Run"]]:
    """How much of everything a run of the small model's makes, and what it may use."""
    amounts = checked(work, preset, outs)
    with timed(amounts.device, minutes) as run:
        yield amounts, run


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
    outs = with_cards(out)
    students = out.with_name(f"{out.name}-lightning")
    with started(work, preset, minutes, *outs, students) as (amounts, run):
        from accelerate import PartialState

        from fulgurite.training.recipe import UNET_FILE, evaluate_in
        from fulgurite.training.recipe import train as run_stages
        from fulgurite.training.students import students_in

        run_stages(work, out, amounts, run)
        if processes() == 1:
            evaluate_in(work, out, students_in(students, out / UNET_FILE), amounts, prompts, run)
        elif PartialState().is_main_process:
            options = ["--model", str(out), "--students", str(students), "--preset", preset]
            options += ["--prompts", str(prompts)]
            command = shlex.join(["fulgurite", "train", "evaluate", str(work), *options])
            typer.echo(f"Trained. To evaluate it, in one process: {command}")


@train.command()
def distil(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the students' LoRA files go.")] = Path("spark-lightning"),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Distils a finished small model into students of 8, 4, 2 and 1 steps."""
    with started(work, preset, minutes, *with_cards(out)) as (amounts, run):
        from fulgurite.training.recipe import distil_from

        distil_from(work, model, out, amounts, run)


@train.command()
def words(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the folders of the text encoders and the tokenizer go.")] = Path(
        "spark-words"
    ),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Teaches a finished small model's text encoders prompts in other words than its captions have."""
    apart(out, model)
    with started(work, preset, minutes, out) as (amounts, run):
        from fulgurite.training.recipe import other_words_from

        other_words_from(work, model, out, amounts, run)


@train.command()
def decoder(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the folders vae and fast_decoder go.")] = Path("spark-decoders"),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Trains a finished small model's decoder on what its UNet draws, and a fast decoder from it."""
    apart(out, model)
    with started(work, preset, minutes, out) as (amounts, run):
        from fulgurite.training.recipe import decoders_from

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
    with started(work, preset, minutes, out) as (amounts, run):
        from fulgurite.training.recipe import fast_decoder_from

        fast_decoder_from(work, model, out, amounts, run)


@train.command()
def evaluate(
    work: Work,
    students: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of the model's students; else the package's."),
    ] = None,
    model: Model = EMBEDDED / "spark",
    prompts: Prompts = 2000,
    preset: Named = "cpu",
    minutes: Minutes = inf,
) -> None:
    """Scores a model and its students: how often an evaluator matches a picture to its caption, Frechet distances."""
    if not students and model.resolve() != (EMBEDDED / "spark").resolve():
        said = "--students: name the folder of this model's students; those in the package are another model's."
        raise FulguriteError(said)
    with started(work, preset, minutes) as (amounts, run):
        from fulgurite.training.recipe import UNET_FILE, evaluate_in, students_inside
        from fulgurite.training.students import students_in

        if processes() > 1:
            raise FulguriteError("Evaluation is for one process: run it without torchrun or accelerate launch.")
        found = students_in(students, model / UNET_FILE) if students else students_inside()
        if not found:
            raise FulguriteError(f"There are no students in {students}.")
        evaluate_in(work, model, found, amounts, prompts, run)


@train.command()
def distil_sdxl(
    work: Work,
    model: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="SDXL's base model: its folder as diffusers publishes it."),
    ],
    pictures: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Pictures, a caption beside each: fox.jpg, fox.txt.")
    ],
    out: Annotated[Path, typer.Option(help="Where the students' files go.")] = Path("sdxl-lightning"),
    minutes: Minutes = inf,
) -> None:
    """Distils SDXL itself, on one GPU or, by accelerate launch, on many."""
    for name, folder in (("WORK", work), ("--out", out)):
        writable(name, folder)
    with timed("cuda", minutes) as run:
        from fulgurite.training.sdxl import distil_sdxl as run_stages

        run_stages(work, model, pictures, out, run)
