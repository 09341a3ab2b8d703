"""The real SDXL distilled: its folder as diffusers publishes it, and a folder of captioned pictures.

accelerate launch -m fulgurite train distil-sdxl WORK --model stable-diffusion-xl-base-1.0 --pictures PICTURES
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps

from fulgurite.cards import Card, card
from fulgurite.errors import FulguriteError
from fulgurite.models import VAE
from fulgurite.training.distil import Ground, distil
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.latents import LatentSet
from fulgurite.training.loop import Run
from fulgurite.training.plans import SDXL
from fulgurite.training.students import students_in, write_card
from fulgurite.training.vae import to_pixels
from fulgurite.weights.files import folder_files
from fulgurite.weights.load import load_text_encoder, load_tokenizer, load_vae

SIZE = (1024, 1024)  # width, height in pixels
BATCH = 4  # a device
TOGETHER = 512  # pictures to an update, on all devices: the paper's
GUIDANCE = 6.0  # of the teacher: the paper's
KINDS = (".jpg", ".jpeg", ".png", ".webp")


def teacher_card() -> Card:
    """SDXL's base model, by its distilled one's card: the networks are the same."""
    return replace(card("bytedance/stable-diffusion-xl-lightning"), schedules=(), guidance_strength=GUIDANCE)


@torch.inference_mode()
def picture_latents(pictures: Path, vae: VAE, size: tuple[int, int], folder: Path) -> LatentSet:
    """Every picture that has a caption beside it (``fox.jpg``, ``fox.txt``), cut to ``size`` and encoded.

    Done once, then read back from ``folder``. Raises FulguriteError where there are none.
    """
    files = sorted(f for f in pictures.iterdir() if f.suffix.lower() in KINDS and f.with_suffix(".txt").exists())
    if not files:
        raise FulguriteError(f"{pictures} holds no pictures with a caption beside each (fox.jpg and fox.txt).")
    made_of = fingerprint(vae, [(file.name, file.stat().st_size) for file in files])
    path, weight = folder / f"latents-{size[0]}x{size[1]}-{len(files)}-{made_of}.npy", vae.quant_conv.weight
    if not path.exists():
        rows = []
        for file in files:
            with Image.open(file) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                pixels = to_pixels(np.asarray(ImageOps.fit(upright, size))[None])
            mean, _ = vae.encode(pixels.to(weight))
            rows.append((mean * vae.config.scaling_factor).half().cpu().numpy())
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(rows))
    return LatentSet(
        size,
        np.load(path, mmap_mode="r"),
        [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files],
    )


def distil_sdxl(work: Path, model: Path, pictures: Path, out: Path, run: Run) -> None:
    """Trains every student of the plan; their files go to ``out``, and beside it a card that serves them."""
    of_model, files, dtype = teacher_card(), folder_files(model), torch.bfloat16
    first, second = of_model.text_encoders
    tokenizers = load_tokenizer(files.tokenizers[0], first), load_tokenizer(files.tokenizers[1], second)
    encoders = (
        load_text_encoder(files.text_encoders[0], first, run.device, dtype, second=False),
        load_text_encoder(files.text_encoders[1], second, run.device, dtype, second=True),
    )
    vae = load_vae(files.vae, of_model, run.device, dtype)
    with PartialState().main_process_first():
        latents = picture_latents(pictures, vae, SIZE, work / "latents")
    ground = Ground(
        of_model, files.unet, tokenizers, encoders, vae, latents, BATCH, run, dtype, checkpointing=True,
        gathered=max(1, round(TOGETHER / (BATCH * PartialState().num_processes))),
    )  # fmt: skip
    for plan in SDXL:
        distil(plan, ground, out, work / "distil")
    if PartialState().is_main_process:
        write_card("sdxl_lightning.toml", out.with_name(f"{out.name}.toml"), files.unet, students_in(out, files.unet))
