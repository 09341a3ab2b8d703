"""What students and decoders are taught from, small: an undistilled model with random weights, and a few scenes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from small_sdxl import FIRST, SECOND, UNET, roughened, write_tokenizer
from small_sdxl import VAE as SMALL_VAE

from fulgurite.cards import card
from fulgurite.models import VAE, CLIPTextEncoder, Tokenizer, UNet
from fulgurite.training.distil import Ground
from fulgurite.training.latents import LatentSet, scene_at
from fulgurite.training.sources import SPRITE, Sprites, Thing
from fulgurite.training.thesaurus import Thesaurus

CARD = replace(card("fulgurite/spark"), unet=UNET, vae=SMALL_VAE, text_encoders=(FIRST, SECOND))
NOTHING = tuple(f"{a}{b}{c}" for a in "bcd" for b in "aeo" for c in "lmn")
THESAURUS = Thesaurus(
    ("fox", "rocket", "tulip", "ufo"),
    {"rocket": ("starship", "space shuttle"), "fox": ("vixen",), "tulip": ("tulipan",)},
    NOTHING,
    NOTHING,
    NOTHING,
)


def small_sprites() -> Sprites:
    """Three things, white squares all."""
    things = [Thing(name, (), {"3d": i}) for i, name in enumerate(("rocket", "fox", "tulip"))]
    return Sprites(things, np.full((3, SPRITE, SPRITE, 4), 255, np.uint8))


def small_ground(folder: Path, count: int = 2, side: int = 8) -> Ground:
    """``count``: of the scenes; ``side``: of their latents, which are noise."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    encoders = [CLIPTextEncoder(FIRST), CLIPTextEncoder(SECOND)]
    save_file(dict(roughened(UNet(UNET)).state_dict()), folder / "unet.safetensors")
    size, sprites = (side * SMALL_VAE.downscale, side * SMALL_VAE.downscale), small_sprites()
    scenes = [scene_at(sprites, size, number) for number in range(count)]
    latents = np.random.default_rng(0).standard_normal((count, 4, side, side)).astype(np.float16)
    tokenizer, vae = Tokenizer.from_folder(folder, 24), VAE(SMALL_VAE).eval()
    shown = LatentSet(size, latents, scenes)
    return Ground(CARD, folder / "unet.safetensors", (tokenizer, tokenizer), encoders, vae, shown, batch=2)
