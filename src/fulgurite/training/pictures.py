"""A folder of captioned pictures as latents on disk: a million pictures' are 131 GB, and hours of work for GPUs."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageOps

from fulgurite.errors import FulguriteError
from fulgurite.models import VAE
from fulgurite.training.files import whole
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.latents import LatentFiles, LatentSet
from fulgurite.training.loop import HERE, Run, TimeIsUpError
from fulgurite.training.vae import to_pixels

KINDS = (".jpg", ".jpeg", ".png", ".webp")
READERS = 8  # threads that read pictures while others are encoded
CHUNK = 64  # pictures in memory together


class UnfitError(Exception):
    """A picture cannot be learned from; says why."""


def picture_latents(pictures: Path, vae: VAE, size: tuple[int, int], folder: Path, run: Run = HERE) -> LatentSet:
    """Every picture that has a caption beside it (``fox.jpg``, ``fox.txt``), cut to ``size`` and encoded.

    Each of several processes encodes its share. A latent is a file in ``folder``, so a run that stopped goes on there,
    and where pictures are added or replaced later, those alone are encoded. Pictures that are broken or smaller than
    ``size`` are left out, and ``left-out.txt`` names them: among a million there are some, and none should end a run
    hours after its start. Raises FulguriteError where no picture remains, TimeIsUpError when the run's time is over.
    """
    processes, captions, (width, height) = PartialState(), captions_in(pictures), size
    latents = folder / f"latents-{width}x{height}-{fingerprint(vae.encoder, vae.quant_conv, vae.config)}"
    files = {name: latents / f"{name}-{(pictures / name).stat().st_size}.npy" for name in captions}
    share = list(files)[processes.process_index :: processes.num_processes]
    unfit = encode_pictures(pictures, {name: files[name] for name in share}, vae, size, run)
    left_out = dict(gather_object(list(unfit.items())))
    if run.over():
        raise TimeIsUpError("The time is up, while pictures are encoded.")
    kept = [name for name in files if name not in left_out]
    if not kept:
        name, why = next(iter(left_out.items()))
        raise FulguriteError(f"No picture in {pictures} can be used, for example {name}: {why}.")
    if processes.is_main_process:
        listing = folder / "left-out.txt"
        listing.write_text("".join(f"{name}: {why}\n" for name, why in sorted(left_out.items())), encoding="utf-8")
        print(f"{len(left_out)} of {len(files)} pictures are left out: {listing} says which and why.", flush=True)
    return LatentSet(size, LatentFiles([files[name] for name in kept]), [captions[name] for name in kept])


def captions_in(pictures: Path) -> dict[str, str]:
    """The captions of the pictures that have one, by the pictures' names."""
    names, captions = {file.name for file in pictures.iterdir()}, {}
    for name in sorted(names):
        text = (pictures / name).with_suffix(".txt")
        if text.name in names and name.lower().endswith(KINDS):
            try:
                captions[name] = text.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise FulguriteError(f"{text} is not text in UTF-8.") from error
    if not captions:
        raise FulguriteError(f"{pictures} holds no pictures with a caption beside each (fox.jpg and fox.txt).")
    return captions


@torch.inference_mode()
def encode_pictures(
    pictures: Path, files: dict[str, Path], vae: VAE, size: tuple[int, int], run: Run
) -> dict[str, str]:
    """Writes the latents ``[C, h, w]``, float16, that are not there yet, until the time is up.

    One at a time: at SDXL's size one keeps a GPU busy. Returns which pictures are left out, and why.
    """
    weight, unfit = vae.quant_conv.weight, dict[str, str]()
    missing = [name for name, file in files.items() if not file.exists()]
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(missing), CHUNK):
            if time.monotonic() > run.until:
                break
            if start % (16 * CHUNK) == 0 and PartialState().is_main_process:
                print(f"Encoding pictures: {start} of this process's {len(missing)} are done.", flush=True)
            chunk = {name: readers.submit(cut, pictures / name, size) for name in missing[start : start + CHUNK]}
            for name, pixels in chunk.items():
                try:
                    mean, _ = vae.encode(to_pixels(pixels.result()[None]).to(weight))
                except UnfitError as error:
                    unfit[name] = str(error)
                    continue
                with whole(files[name]) as new:
                    np.save(new, (mean[0] * vae.config.scaling_factor).half().cpu().numpy())
    return unfit


def cut(picture: Path, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, upright, as pixels ``[H, W, 3]``, uint8. Raises UnfitError."""
    try:
        with Image.open(picture) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise all kinds
        raise UnfitError(f"it cannot be read ({error})") from error
    if upright.width < size[0] or upright.height < size[1]:
        raise UnfitError(f"it is {upright.width}x{upright.height}, smaller than {size[0]}x{size[1]}")
    return np.array(ImageOps.fit(upright, size))
