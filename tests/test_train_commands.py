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
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npm").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


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
