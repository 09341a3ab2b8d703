"""What a recipe keeps is there whole or not at all, so that a run that was killed goes on from nothing broken."""

import json
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ground import small_ground, small_sprites
from small_sdxl import VAE as SMALL_VAE

from fulgurite.errors import FulguriteError
from fulgurite.models import VAE
from fulgurite.training import decoder, fast_decoder, latents
from fulgurite.training.files import whole
from fulgurite.training.sources import fetch


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder/numbers.npy"

    def write(number: int, fails: bool) -> None:
        with whole(path) as new:
            np.save(new, np.array([number]))
            assert not fails

    with pytest.raises(AssertionError):
        write(1, fails=True)
    assert not path.exists()
    write(2, fails=False)
    with pytest.raises(AssertionError):
        write(3, fails=True)
    assert np.load(path) == [2]
    assert [file.name for file in path.parent.iterdir() if file != path] == ["new-numbers.npy"]


@pytest.mark.parametrize("kept", ["latents", "drawn", "pictures"])
def test_arrays_that_were_written_in_part_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    monkeypatch.setattr(latents, "workers", lambda count: ThreadPoolExecutor(1))
    monkeypatch.setattr(latents, "encode_scenes", lambda *_: np.zeros((2, 4, 8, 8), np.float16))
    monkeypatch.setattr(decoder, "drawn_again", lambda ground, latents: np.zeros((2, 4, 8, 8), np.float16))
    sprites, vae = small_sprites(), VAE(SMALL_VAE).eval()
    np.save(tmp_path / "sprites.npy", sprites.pixels)
    (tmp_path / "things.json").write_text(json.dumps([asdict(thing) for thing in sprites.things]))
    ground = small_ground(tmp_path)
    make = {
        "latents": lambda: latents.build_latents(tmp_path, None, vae, (32, 32), 2, tmp_path / "kept").latents,
        "drawn": lambda: decoder.as_drawn(ground, tmp_path / "kept", 100),
        "pictures": lambda: fast_decoder.pictures_of(vae, torch.zeros(2, 4, 8, 8), "cpu", tmp_path / "kept/some.npy"),
    }[kept]
    save = np.save

    def killed(path: Path, array: np.ndarray) -> None:
        save(path, array)
        path.write_bytes(path.read_bytes()[:-1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert len(make()) == 2


def test_a_package_is_unpacked_whole_and_npm_that_fails_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "icons.json").write_text("{}")

    def pack(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with tarfile.open(tmp_path / "packages/some-1.0.0.tgz", "w:gz") as archive:
            archive.add(tmp_path / "icons.json", "package/icons.json")
        return subprocess.CompletedProcess(command, 0, "some-1.0.0.tgz\n")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", pack)

    def killed(archive: tarfile.TarFile, path: Path, filter: str) -> None:
        path.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch("@some/icons@1.0.0", tmp_path / "packages")
    package = fetch("@some/icons@1.0.0", tmp_path / "packages")
    assert (package / "icons.json").read_text() == "{}"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, ""))
    assert fetch("@some/icons@1.0.0", tmp_path / "packages") == package
    with pytest.raises(FulguriteError, match="npm could not fetch @other/icons@1"):
        fetch("@other/icons@1.0.0", tmp_path / "packages")
