"""The pictures that SDXL is distilled with: encoded once whatever stops a run, by all processes, without unfit ones."""

import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_ground import small_ground
from small_sdxl import VAE as SMALL_VAE

from fulgurite.errors import FulguriteError
from fulgurite.models import VAE
from fulgurite.training import pictures as module
from fulgurite.training.distil import Distillation, distil
from fulgurite.training.latents import LatentSet
from fulgurite.training.loop import Run, TimeIsUpError
from fulgurite.training.pictures import picture_latents
from fulgurite.training.vae import to_pixels

SIZE = (32, 32)


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(SMALL_VAE).eval()


@pytest.fixture
def encoded(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The red of each picture that is encoded, which is its number."""
    seen, encode = [], vae.encode

    def counted(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(round((float(pixels[0, 0, 0, 0]) + 1) * 127.5))
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", counted)
    return seen


def add(folder: Path, *numbers: int, size: tuple[int, int] = (40, 48)) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f" picture {number}\n")


def test_a_pictures_latent_is_that_of_its_middle_upright(vae: VAE, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "fox.png", exif=turned)
    (tmp_path / "fox.txt").write_text("a fox")
    (tmp_path / "no caption.png").write_bytes((tmp_path / "fox.png").read_bytes())
    found = picture_latents(tmp_path, vae, SIZE, tmp_path / "latents")
    with torch.no_grad():
        mean, _ = vae.encode(to_pixels(pixels[None, :, 16:48]))
    assert (found.size, found.scenes) == (SIZE, ["a fox"])
    np.testing.assert_array_equal(found.latents[:], (mean * SMALL_VAE.scaling_factor).half().numpy())


def test_pictures_are_encoded_once_whatever_stops_a_run(
    vae: VAE, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, folder = tmp_path / "pictures", tmp_path / "latents"
    add(pictures, *range(1, 7))
    encode = vae.encode

    def interrupted(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            picture_latents(pictures, vae, SIZE, folder)
    picture_latents(pictures, vae, SIZE, folder)
    assert encoded == [1, 2, 3, 4, 5, 6]
    add(pictures, 7)
    again = picture_latents(pictures, vae, SIZE, folder)
    assert encoded == [1, 2, 3, 4, 5, 6, 7]
    torch.nn.init.zeros_(vae.quant_conv.weight)
    other = picture_latents(pictures, vae, SIZE, folder)
    assert len(encoded) == 14
    assert not np.array_equal(other.latents[:], again.latents[:])


def test_each_process_encodes_its_share_and_knows_all(
    vae: VAE, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path / "pictures", 1, 2, 3, 5)
    add(tmp_path / "pictures", 4, size=(40, 20))
    told = list[object]()

    def gather(mine: list[object]) -> list[object]:
        told.extend(mine)
        return told

    monkeypatch.setattr(module, "gather_object", gather)
    for index, share in ((1, [2]), (0, [1, 3, 5])):
        encoded.clear()
        process = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0)
        monkeypatch.setattr(module, "PartialState", lambda process=process: process)
        found = picture_latents(tmp_path / "pictures", vae, SIZE, tmp_path / "latents")
        assert encoded == share
    assert found.scenes == [f"picture {number}" for number in (1, 2, 3, 5)]
    assert found.latents[:].shape == (4, 4, 8, 8)


def test_broken_and_small_pictures_are_left_out_and_named(
    vae: VAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, folder = tmp_path / "pictures", tmp_path / "latents"
    add(pictures, 1, 2)
    add(pictures, 3, size=(40, 31))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(pictures / "1.png")
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    found = picture_latents(pictures, vae, SIZE, folder)
    assert found.scenes == ["picture 2"]
    assert f"2 of 3 pictures are left out: {folder / 'left-out.txt'} says" in capsys.readouterr().out
    broken, small = (folder / "left-out.txt").read_text().splitlines()
    assert broken.startswith("1.png: it cannot be read (")
    assert small == "3.png: it is 40x31, smaller than 32x32"
    (pictures / "1.png").write_bytes(whole)
    assert picture_latents(pictures, vae, SIZE, folder).scenes == ["picture 1", "picture 2"]
    assert (folder / "left-out.txt").read_text() == f"{small}\n"


def test_a_folder_that_nothing_can_be_learned_from_is_refused(vae: VAE, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(FulguriteError, match="holds no pictures with a caption"):
        picture_latents(pictures, vae, SIZE, tmp_path / "latents")
    add(pictures, 1, size=(8, 8))
    with pytest.raises(FulguriteError, match=re.escape("can be used, for example 1.png: it is 8x8, smaller than")):
        picture_latents(pictures, vae, SIZE, tmp_path / "latents")
    (pictures / "1.txt").write_bytes("füchse".encode("latin-1"))
    with pytest.raises(FulguriteError, match=f"{re.escape(str(pictures))}/1.txt is not text in UTF-8"):
        picture_latents(pictures, vae, SIZE, tmp_path / "latents")


def test_encoding_stops_when_the_time_is_up(
    vae: VAE, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    add(tmp_path / "pictures", *range(1, 6))
    now = iter((1, 2, 3))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(TimeIsUpError, match="while pictures are encoded"):
        picture_latents(tmp_path / "pictures", vae, SIZE, tmp_path / "latents", Run(until=2))
    assert encoded == [1, 2, 3, 4]


def test_students_learn_from_latents_that_are_read_where_they_are_looked_at(vae: VAE, tmp_path: Path) -> None:
    add(tmp_path / "pictures", *range(1, 5), size=(32, 32))
    shown = picture_latents(tmp_path / "pictures", vae, SIZE, tmp_path / "latents")
    held = LatentSet(shown.size, shown.latents[:], shown.scenes)
    for one, other in zip(shown.batch(3, random.Random(1)), held.batch(3, random.Random(1)), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    plan = Distillation("4", None, 8, 4, "squared", None, updates=2, peak=1e-3, rank=2)
    students = [
        load_file(
            distil(plan, replace(small_ground(tmp_path), latents=latents), tmp_path / name, tmp_path / "work" / name)
        )
        for name, latents in (("files", shown), ("memory", held))
    ]
    assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())
