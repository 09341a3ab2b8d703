"""`fulgurite train`: the small model from nothing, its students of few steps, and what they are worth."""

import shutil
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from fulgurite.training.recipe import Preset

train = typer.Typer(no_args_is_help=True, help="Trains, distils and evaluates the small model.")
EMBEDDED = Path(str(resources.files("fulgurite") / "embedded"))

Work = Annotated[Path, typer.Argument(help="A folder for data and checkpoints; a run that stopped goes on there.")]
Named = Annotated[str, typer.Option("--preset", help="How much of everything: cpu or gpu.")]
Model = Annotated[Path, typer.Option(help="The undistilled model's folder; else the one inside the package.")]


def checked(preset: str) -> "Preset":
    """The preset of this name, on a machine that has what training needs."""
    if find_spec("resvg_py") is None:
        raise FulguriteError("Training needs more packages: pip install 'fulgurite[train]'.")
    if shutil.which("npm") is None:
        raise FulguriteError("Training fetches its pictures with npm, which is not installed here.")
    from fulgurite.training.recipe import PRESETS

    if preset not in PRESETS:
        raise FulguriteError(f"--preset: there is no {preset!r}; there are {' and '.join(PRESETS)}.")
    return PRESETS[preset]


@train.command()
def recipe(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the weights go; the students' beside it.")] = Path("spark"),
    preset: Named = "cpu",
) -> None:
    """Trains the small model from nothing and distils it, by the recipe that made those inside the package."""
    amounts = checked(preset)
    from fulgurite.training.recipe import train as run

    run(work, out, amounts)


@train.command()
def distil(
    work: Work,
    out: Annotated[Path, typer.Option(help="Where the students' LoRA files go.")] = Path("spark-lightning"),
    model: Model = EMBEDDED / "spark",
    preset: Named = "cpu",
) -> None:
    """Distils a finished small model into students of 8, 4, 2 and 1 steps."""
    amounts = checked(preset)
    from fulgurite.training.recipe import distil_from

    distil_from(work, model, out, amounts)


@train.command()
def evaluate(
    work: Work,
    students: Annotated[Path, typer.Option(help="A folder of LoRA files whose names begin with their steps.")],
    model: Model = EMBEDDED / "spark",
    prompts: Annotated[int, typer.Option(min=100, help="How many held-out captions are drawn.")] = 2000,
    preset: Named = "cpu",
) -> None:
    """Prints how often an encoder of pictures and captions finds what was asked for, and how real pictures look."""
    amounts = checked(preset)
    from fulgurite.training.recipe import evaluate_in

    evaluate_in(work, model, students, amounts, prompts)
