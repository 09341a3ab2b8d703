"""The embedded model from nothing, as one command: data, autoencoder, teacher, then the files that ship."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fulgurite.cards import card
from fulgurite.models import Tokenizer
from fulgurite.models.tokenizer import END
from fulgurite.training.latents import build_latents
from fulgurite.training.scenes import caption, random_scene
from fulgurite.training.sources import Sprites, build
from fulgurite.training.teacher import train_teacher, train_tokenizer
from fulgurite.training.vae import normalize_latents, render_pictures, to_pixels, train_vae

MODEL = "fulgurite/spark"


@dataclass(frozen=True)
class Preset:
    """How much of everything, for one kind of machine."""

    device: str
    small: bool  # two styles of the commonest things, instead of all
    vae_steps: int
    scenes: int  # square ones; each other shape gets a twelfth as many
    teacher_steps: int
    batch: int


PRESETS = {
    "cpu": Preset("cpu", True, vae_steps=1150, scenes=7000, teacher_steps=4000, batch=32),
    "gpu": Preset("cuda", False, vae_steps=20_000, scenes=200_000, teacher_steps=100_000, batch=256),
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
    save_network(vae, out / "vae/diffusion_pytorch_model.safetensors")

    shapes = of_model.native_shapes
    counts = [preset.scenes] + [preset.scenes // 12] * (len(shapes) - 1)
    sets = [
        build_latents(sprites_folder, vae, shape, count, work / "latents")
        for shape, count in zip(shapes, counts, strict=True)
    ]
    tokenizer = Tokenizer.from_folder(out / "tokenizer", of_model.text_encoders[0].max_position_embeddings)
    torch.set_float32_matmul_precision("high")
    networks = train_teacher(
        sets, of_model, tokenizer, work / "teacher", preset.teacher_steps, preset.device, preset.batch
    )
    save_network(networks["unet"], out / "unet/diffusion_pytorch_model.safetensors")
    save_network(networks["text_encoder"], out / "text_encoder/model.safetensors")
    save_network(networks["text_encoder_2"], out / "text_encoder_2/model.safetensors")
