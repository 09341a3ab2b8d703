"""The embedded model from nothing, as one command: data, autoencoder, text encoders, UNet, then the files that ship."""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fulgurite.cards import card
from fulgurite.models import Tokenizer
from fulgurite.models.tokenizer import END
from fulgurite.training.latents import LatentSet, build_latents
from fulgurite.training.scenes import caption, random_scene
from fulgurite.training.sources import Sprites, build
from fulgurite.training.teacher import train_teacher, train_tokenizer
from fulgurite.training.text import train_text_encoders
from fulgurite.training.vae import normalize_latents, refine_decoder, render_pictures, to_pixels, train_vae
from fulgurite.training.words import FIRST

MODEL = "fulgurite/spark"


@dataclass(frozen=True)
class Preset:
    """How much of everything, for one kind of machine."""

    device: str
    small: bool  # two styles of the commonest things, instead of all
    vae_steps: int
    text_steps: int
    scenes: int  # square ones; each other shape gets a twelfth as many
    teacher_steps: int
    focus_steps: int  # on the few things of FIRST alone, where there is not the time to learn all well
    batch: int
    decoder_steps: int


PRESETS = {
    "cpu": Preset(
        "cpu",
        True,
        vae_steps=1150,
        text_steps=700,
        scenes=6000,
        teacher_steps=4000,
        focus_steps=2300,
        batch=32,
        decoder_steps=700,
    ),
    "gpu": Preset(
        "cuda",
        False,
        vae_steps=20_000,
        text_steps=5000,
        scenes=200_000,
        teacher_steps=100_000,
        focus_steps=0,
        batch=256,
        decoder_steps=10_000,
    ),
}


def save_network(network: nn.Module, path: Path) -> None:
    """Writes float16 safetensors in the published layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous().cpu() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_tokenizer(sprites: Sprites, size: int, folder: Path) -> None:
    """Learns the vocabulary from captions, and writes it as CLIP's tokenizer is published."""
    rng = random.Random("tokenizer")
    texts = (caption(random_scene(rng, sprites), rng) for _ in range(20_000))
    vocab, merges = train_tokenizer(texts, size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": END}), encoding="utf-8")


def train(work: Path, out: Path, preset: Preset) -> None:
    """Runs every stage in ``work``, each going on from where it was, and writes the model's folder ``out``."""
    of_model = card(MODEL)
    sprites_folder = work / "sprites"
    sprites_folder.mkdir(parents=True, exist_ok=True)
    sprites = build(sprites_folder, preset.small)
    write_tokenizer(sprites, of_model.text_encoders[0].vocab_size, out / "tokenizer")

    vae = train_vae(sprites, of_model.vae, work / "vae", preset.vae_steps, preset.device)
    pixels = to_pixels(render_pictures(sprites, 128, "normalize")).to(preset.device)
    normalize_latents(vae, pixels)
    tokenizer = Tokenizer.from_folder(out / "tokenizer", of_model.text_encoders[0].max_position_embeddings)
    encoders = train_text_encoders(sprites, of_model, tokenizer, work / "text", preset.text_steps, preset.device)
    for name, encoder in encoders.items():
        save_network(encoder, out / name / "model.safetensors")

    def latents(names: frozenset[str] | None, count: int, folder: Path) -> list[LatentSet]:
        """Square scenes, then those of the other native shapes, a twelfth as many of each."""
        square, *others = of_model.native_shapes
        counts = [(square, count)] + [(shape, count // 12) for shape in others]
        return [build_latents(sprites_folder, names, vae, shape, number, folder) for shape, number in counts]

    torch.set_float32_matmul_precision("high")
    teach = partial(
        train_teacher, card=of_model, tokenizer=tokenizer, encoders=encoders, device=preset.device, batch=preset.batch
    )
    everything = latents(None, preset.scenes, work / "latents")
    unet = teach(everything, folder=work / "teacher", steps=preset.teacher_steps)
    if preset.focus_steps:
        few = latents(FIRST, preset.scenes, work / "focus_latents")
        unet = teach(few, folder=work / "focus", steps=preset.focus_steps, start=unet)
    save_network(unet, out / "unet/diffusion_pytorch_model.safetensors")
    vae = refine_decoder(sprites, vae, work / "decoder", preset.decoder_steps, preset.device)
    save_network(vae, out / "vae/diffusion_pytorch_model.safetensors")
