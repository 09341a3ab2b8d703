"""`fulgurite train`: what it refuses, and says so before hours are spent."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fulgurite import cli_training
from fulgurite.cli import app

pytest.importorskip("resvg_py")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where --out's defaults are


def train(*words: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, words)])


def test_a_folder_is_one_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the larger one would go on from what the smaller one began."""
    monkeypatch.setattr("fulgurite.training.recipe.distil_from", lambda *_: None)
    monkeypatch.setattr(cli_training, "timed", lambda device, minutes: nullcontext())
    for _ in range(2):
        assert train("distil", tmp_path / "work", "--preset", "gpu").exit_code == 0
    refused = train("distil", tmp_path / "work", "--preset", "cpu")
    assert (refused.exit_code, "holds what the preset gpu made" in refused.output) == (1, True)
    assert train("distil", tmp_path / "other", "--preset", "cpu").exit_code == 0


def test_a_folder_without_students_is_not_evaluated(tmp_path: Path) -> None:
    refused = train("evaluate", tmp_path / "work", "--students", tmp_path)
    assert (refused.exit_code, "There are no students in" in refused.output) == (1, True)
    refused = train("evaluate", tmp_path / "other", "--students", tmp_path / "none")
    assert (refused.exit_code, "--students" in refused.output) == (2, True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["words", "decoder"])
def test_a_model_is_not_taught_in_place(tmp_path: Path, command: str) -> None:
    refused = train(command, tmp_path / "work", "--model", tmp_path, "--out", tmp_path)
    assert (refused.exit_code, "--out: name another folder than the model's" in refused.output) == (1, True)


def test_a_model_of_your_own_is_evaluated_with_its_own_students(tmp_path: Path) -> None:
    refused = train("evaluate", tmp_path / "work", "--model", tmp_path)
    assert (refused.exit_code, "--students: name the folder of this model's students" in refused.output) == (1, True)


@pytest.fixture
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(device: str, minutes: float) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(cli_training, "timed", begun)


@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize("command", ["recipe", "words", "distil", "decoder", "fast-decoder", "evaluate"])
def test_a_work_folder_that_cannot_be_one_is_named_before_anything_begins(tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.touch()
    for work, said in (
        (file, f"Error: WORK: {file} is a file, and should be a folder.\n"),
        (file / "x", f"Error: WORK: cannot write into the folder {file}/x: Not a directory.\n"),
    ):
        refused = train(command, work)
        assert (refused.exit_code, refused.output) == (1, said)


@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize("command", ["recipe", "words", "distil", "decoder", "fast-decoder"])
def test_an_out_folder_that_cannot_be_one_is_named_before_anything_begins(tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.touch()
    refused = train(command, tmp_path / "work", "--out", file)
    said = f"Error: --out: {file} is a file, and should be a folder.\n"
    assert (refused.exit_code, refused.output) == (1, said)


@pytest.mark.usefixtures("nothing_begins")
def test_what_goes_beside_the_out_folder_has_a_place(tmp_path: Path) -> None:
    students = tmp_path / "fox-lightning"
    students.touch()
    refused = train("recipe", tmp_path / "work", "--out", tmp_path / "fox")
    assert (refused.exit_code, f"--out: {students} is a file" in refused.output) == (1, True)
    for out in (".", "..", "/"):
        for command in ("recipe", "distil"):
            refused = train(command, tmp_path / "work", "--out", out)
            assert (refused.exit_code, f"--out: {out} has no name" in refused.output) == (1, True)


@pytest.mark.usefixtures("nothing_begins")
def test_distilling_sdxl_checks_its_folders_too(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    given = ("--model", tmp_path, "--pictures", tmp_path)
    assert f"WORK: {file} is a file" in train("distil-sdxl", file, *given).output
    assert f"--out: {file} is a file" in train("distil-sdxl", tmp_path / "work", *given, "--out", file).output


@pytest.mark.usefixtures("nothing_begins")
def test_a_folder_that_does_not_take_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli_training, "TemporaryFile", denied)  # whoever runs this: root may write anywhere
    refused = train("recipe", tmp_path)
    said = f"Error: WORK: cannot write into the folder {tmp_path}: Permission denied.\n"
    assert (refused.exit_code, refused.output) == (1, said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_for_a_gpu_needs_one(tmp_path: Path) -> None:
    for words in (
        ("distil", tmp_path / "work", "--preset", "gpu"),
        ("distil-sdxl", tmp_path / "sdxl", "--model", tmp_path, "--pictures", tmp_path),
    ):
        refused = train(*words)
        assert (refused.exit_code, "torch finds none" in refused.output) == (1, True)


def test_folders_that_are_not_there_are_named(tmp_path: Path) -> None:
    refused = train("distil-sdxl", tmp_path / "sdxl", "--model", tmp_path, "--pictures", tmp_path / "none")
    assert (refused.exit_code, "--pictures" in refused.output) == (2, True)
