"""The embedded model from nothing, as one command: data, autoencoder, text encoders, UNet, students of few steps."""

import json
import random
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fulgurite.cards import card
from fulgurite.models import Tokenizer
from fulgurite.models.tokenizer import END
from fulgurite.training.distil import Distillation, Ground, distil
from fulgurite.training.evaluation import evaluate
from fulgurite.training.latents import LatentSet, build_latents
from fulgurite.training.plans import PAPER, QUICK
from fulgurite.training.scenes import caption, no_caption, random_scene
from fulgurite.training.sources import Sprites, build
from fulgurite.training.teacher import train_teacher, train_tokenizer
from fulgurite.training.text import train_text_encoders
from fulgurite.training.vae import normalize_latents, refine_decoder, render_pictures, to_pixels, train_vae
from fulgurite.training.words import FIRST
from fulgurite.weights.load import load_folder

MODEL = "fulgurite/spark"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
READER_STEPS = 500  # of the judge that evaluates


@dataclass(frozen=True)
class Preset:
    """How much of everything, for one kind of machine."""

    device: str
    small: bool  # two styles of the commonest things, instead of all
    things: frozenset[str] | None  # the scenes hold these alone; None: all
    vae_steps: int
    scenes: int
    text_steps: int
    teacher_steps: int
    batch: int
    decoder_steps: int
    distillations: tuple[Distillation, ...]
    rank: int  # of the students' changes
    convolutions: bool  # whether students change them too


PRESETS = {
    "cpu": Preset(
        "cpu", True, FIRST, vae_steps=1150, scenes=6000, text_steps=1500, teacher_steps=5000, batch=32,
        decoder_steps=1500, distillations=QUICK, rank=3, convolutions=False,
    ),
    "gpu": Preset(
        "cuda", False, None, vae_steps=20_000, scenes=200_000, text_steps=10_000, teacher_steps=100_000, batch=256,
        decoder_steps=10_000, distillations=PAPER, rank=64, convolutions=True,
    ),
}  # fmt: skip


def save_network(network: nn.Module, path: Path) -> None:
    """Writes float16 safetensors in the published layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous().cpu() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_tokenizer(sprites: Sprites, size: int, folder: Path) -> None:
    """Learns the vocabulary from captions, and writes it as CLIP's tokenizer is published."""
    rng = random.Random("tokenizer")
    captions = (caption(random_scene(rng, sprites), rng) for _ in range(20_000))
    texts = chain(captions, (no_caption(rng) for _ in range(1_000)))
    vocab, merges = train_tokenizer(texts, size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": END}), encoding="utf-8")


def distil_all(
    work: Path,
    model: Path,
    out: Path,
    preset: Preset,
    tokenizer: Tokenizer,
    encoders: nn.ModuleDict,
    latents: LatentSet,
) -> None:
    """Trains every student of the preset's plan; those that ship, a schedule's steps their names, go to ``out``."""
    ground = Ground(
        card(MODEL),
        model / UNET_FILE,
        tokenizer,
        encoders,
        latents,
        preset.rank,
        preset.convolutions,
        preset.batch // 2,
        preset.device,
    )
    out.mkdir(parents=True, exist_ok=True)
    for plan in preset.distillations:
        student = distil(plan, ground, work / "students", work / "distil")
        if plan.name == str(plan.steps):
            shutil.copyfile(student, out / f"{plan.steps}step_lora.safetensors")


def distil_from(work: Path, model: Path, out: Path, preset: Preset) -> None:
    """Students of a finished model in the folder ``model``, instead of one that was trained here."""
    of_model = card(MODEL)
    networks = load_folder(model, of_model, preset.device, torch.float32)
    sprites_folder = work / "sprites"
    sprites_folder.mkdir(parents=True, exist_ok=True)
    build(sprites_folder, preset.small)
    latents = build_latents(
        sprites_folder, preset.things, networks.vae, of_model.native_shapes[0], preset.scenes, work / "latents"
    )
    encoders = nn.ModuleDict(dict(zip(("text_encoder", "text_encoder_2"), networks.text_encoders, strict=True)))
    distil_all(work, model, out, preset, networks.tokenizers[0], encoders, latents)


def evaluate_in(work: Path, model: Path, students: Path, preset: Preset, count: int) -> None:
    """Prints a table of what the model in a folder and its students get, and keeps it in ``work``."""
    of_model = card(MODEL)
    networks = load_folder(model, of_model, "cpu", torch.float32)
    (work / "sprites").mkdir(parents=True, exist_ok=True)
    build(work / "sprites", preset.small)
    sprites = Sprites.open(work / "sprites", preset.things)
    evaluate(of_model, networks, model / UNET_FILE, students, sprites, work / "evaluation", count, READER_STEPS)


def train(work: Path, out: Path, preset: Preset) -> None:
    """Runs every stage in ``work``, each going on from where it was, and writes the model's folder ``out``."""
    of_model = card(MODEL)
    sprites_folder = work / "sprites"
    sprites_folder.mkdir(parents=True, exist_ok=True)
    build(sprites_folder, preset.small)
    sprites = Sprites.open(sprites_folder, preset.things)
    write_tokenizer(sprites, of_model.text_encoders[0].vocab_size, out / "tokenizer")
    tokenizer = Tokenizer.from_folder(out / "tokenizer", of_model.text_encoders[0].max_position_embeddings)

    vae = train_vae(sprites, of_model.vae, work / "vae", preset.vae_steps, preset.device)
    normalize_latents(vae, to_pixels(render_pictures(sprites, 128, "normalize")).to(preset.device))
    shape, *others = of_model.native_shapes
    square = build_latents(sprites_folder, preset.things, vae, shape, preset.scenes, work / "latents")
    oblong = [
        build_latents(sprites_folder, preset.things, vae, other, preset.scenes // 12, work / "latents")
        for other in others
    ]
    torch.set_float32_matmul_precision("high")
    encoders = train_text_encoders(
        sprites, square, of_model, tokenizer, work / "text", preset.text_steps, preset.device
    )
    for name, encoder in encoders.items():
        save_network(encoder, out / name / "model.safetensors")
    unet = train_teacher(
        [square, *oblong], of_model, tokenizer, encoders, work / "teacher", preset.teacher_steps, preset.device,
        preset.batch,
    )  # fmt: skip
    save_network(unet, out / UNET_FILE)
    vae = refine_decoder(sprites, vae, work / "decoder", preset.decoder_steps, preset.device)
    save_network(vae, out / "vae/diffusion_pytorch_model.safetensors")
    distil_all(work, out, out.with_name(f"{out.name}-lightning"), preset, tokenizer, encoders, square)
