"""The embedded model from nothing, as one command: data, autoencoder, text encoders, UNet, decoders, students."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from fulgurite.cards import card
from fulgurite.models import VAE, CLIPTextConfig, Tokenizer
from fulgurite.training.decoder import as_drawn, refine_decoder
from fulgurite.training.distil import Distillation, Ground, distil
from fulgurite.training.evaluation.arrangements import arrangements
from fulgurite.training.evaluation.negatives import negatives
from fulgurite.training.evaluation.scores import Evaluation, evaluate, ways_of
from fulgurite.training.evaluation.styles import styles
from fulgurite.training.evaluation.wordings import wordings
from fulgurite.training.fast_decoder import PICTURES, train_fast_decoder
from fulgurite.training.files import whole
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.latents import FEW, LatentSet, build_latents
from fulgurite.training.loop import Run, save_network
from fulgurite.training.other_words import teach_other_words, understood
from fulgurite.training.plans import QUICK, SMALL
from fulgurite.training.precision import half
from fulgurite.training.preview import preview_lines
from fulgurite.training.prompts import Wording
from fulgurite.training.scenes import random_scene
from fulgurite.training.sources import Sprites, build
from fulgurite.training.students import students_in, write_card
from fulgurite.training.teacher import train_teacher
from fulgurite.training.text import train_text_encoders
from fulgurite.training.thesaurus import Thesaurus
from fulgurite.training.vae import normalize_latents, render_pictures, to_pixels, train_vae
from fulgurite.training.vocabulary import Grown, add_words, grow, write_tokenizer, write_vocabulary
from fulgurite.training.words import FIRST
from fulgurite.weights.files import Files
from fulgurite.weights.load import load_folder, locate

MODEL = "fulgurite/spark"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
FAST_DECODER_FILE = "fast_decoder/diffusion_pytorch_model.safetensors"
READER_STEPS = 1500  # of the evaluator
LOOKED_INTO = "teacher, 8 steps", "student, 4 steps"  # the ways of which more than the scores is evaluated
EACH = 20  # pictures a prompt of theirs: about five minutes on two cores
ARRANGED = 200  # pictures of each arrangement
WORDED = 500  # pictures of prompts in other words
LESSONS = 8000  # scenes to train the decoder further with, at most
TEXTS = 40_000  # of other words, from which the tokenizer learns more
TEXT_ENCODERS = "text_encoder", "text_encoder_2"


@dataclass(frozen=True)
class Preset:
    """How much of everything, for one kind of machine."""

    device: str
    small: bool  # four styles of the commonest things, instead of all
    things: frozenset[str] | None  # the scenes hold these alone; None: all
    vae_steps: int
    scenes: int
    text_steps: int
    teacher_steps: int
    batch: int
    words_steps: int
    decoder_steps: int
    fast_decoder_steps: int
    distillations: tuple[Distillation, ...]


PRESETS = {
    "cpu": Preset(
        "cpu", True, FIRST, vae_steps=1150, scenes=40_000, text_steps=4000, teacher_steps=20_000, batch=32,
        words_steps=8000, decoder_steps=4000, fast_decoder_steps=11_000, distillations=QUICK,
    ),
    "gpu": Preset(
        "cuda", False, None, vae_steps=20_000, scenes=200_000, text_steps=10_000, teacher_steps=100_000, batch=256,
        words_steps=20_000, decoder_steps=10_000, fast_decoder_steps=50_000, distillations=SMALL,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Sprites, and scenes of them as latents."""

    sprites: Sprites
    folder: Path
    preset: Preset

    @classmethod
    def built(cls, work: Path, preset: Preset) -> "Data":
        """Fetches and draws the sprites; done once, by the first process."""
        folder = work / "sprites"
        folder.mkdir(parents=True, exist_ok=True)
        with PartialState().main_process_first():
            build(folder, preset.small)
        return cls(Sprites.open(folder, preset.things), folder, preset)

    def latents(self, vae: VAE, size: tuple[int, int], count: int, work: Path) -> LatentSet:
        with PartialState().main_process_first():
            return build_latents(self.folder, self.preset.things, vae, size, count, work / "latents")


def distil_all(work: Path, out: Path, preset: Preset, ground: Ground, preview: str = "") -> None:
    """Trains every student of the preset's plan; those that ship go to the folder ``out``, and their card beside it."""
    students = work / f"students-{fingerprint(ground.unet, *ground.encoders, ground.latents.latents[:FEW])}"
    shipped = {"8", "4", "2", "1"} | {plan.upon for plan in preset.distillations if plan.rank}
    for plan in preset.distillations:
        student = distil(plan, ground, students, work / "distil")
        if plan.name in shipped and PartialState().is_main_process:
            with whole(out / student.name) as new:
                shutil.copyfile(student, new)
    if PartialState().is_main_process:
        card_file, found = out.with_name(f"{out.name}.toml"), students_in(out, ground.unet)
        write_card("spark_lightning.toml", card_file, ground.unet, found, preview)


def thesaurus_of(work: Path, sprites: Sprites, tokenizer: Tokenizer) -> Thesaurus:
    return Thesaurus.of(sprites.things, tokenizer.words or (), work / "sprites/packages")


def wording(work: Path, sprites: Sprites, tokenizer: Tokenizer, held_out: bool = False) -> Wording:
    """Other words for the scenes of these sprites."""
    with PartialState().main_process_first():
        thesaurus = thesaurus_of(work, sprites, tokenizer)
    return Wording.of(thesaurus, tokenizer, held_out)


def more_words(tokenizer: Path, words: Wording, sprites: Sprites) -> Grown:
    """The vocabulary in a tokenizer's folder, with other words for scenes in the places that are left."""
    rng = random.Random("more words")
    return grow(tokenizer, (words.pair(random_scene(rng, sprites), rng)[1] for _ in range(TEXTS)))


def examples(words: Wording, scenes: Sequence[Any]) -> list[tuple[str, str]]:
    """A few captions and other words, which are others where these are written otherwise."""
    return [words.pair(scene, random.Random(i)) for i, scene in enumerate(scenes[:FEW])]


def learn_vocabulary(work: Path, sprites: Sprites, config: CLIPTextConfig, folder: Path) -> None:
    """Writes a tokenizer of captions and then of other words into ``folder``."""
    write_tokenizer(sprites, config.vocab_size, folder)
    captions = Tokenizer.from_folder(folder, config.max_position_embeddings)
    grown = more_words(folder, Wording.of(thesaurus_of(work, sprites, captions), captions), sprites)
    write_vocabulary(folder, grown.vocab, grown.merges)


def other_words(
    work: Path, words: Wording, tokenizer: Path, out: Path, preset: Preset, ground: Ground, sprites: Sprites
) -> Ground:
    """Teaches the ground's text encoders other words, and returns the ground with what they have become.

    ``tokenizer``: the folder of its tokenizer, which grows; both are written into the model's folder ``out``.
    """
    length = ground.tokenizers[0].length
    grown = more_words(tokenizer, words, sprites)
    if PartialState().is_main_process:
        shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
        write_vocabulary(out / "tokenizer", grown.vocab, grown.merges)
    PartialState().wait_for_everyone()
    words = replace(words, tokenizer=Tokenizer.from_folder(out / "tokenizer", length))
    scenes = ground.latents.scenes
    folder = (
        work / f"words-{fingerprint(ground.unet, *ground.encoders, grown, words.thesaurus, examples(words, scenes))}"
    )
    encoders = teach_other_words(ground, words, grown.new, folder, preset.words_steps)
    if PartialState().is_main_process:
        for name, encoder in zip(TEXT_ENCODERS, encoders, strict=True):
            save_network(encoder, out / name / "model.safetensors")
        add_words(out / "tokenizer", understood(encoders, words, ground.run.device).taught())
    PartialState().wait_for_everyone()
    listed = Tokenizer.from_folder(out / "tokenizer", length)
    return replace(ground, encoders=encoders, tokenizers=(listed, listed))


def decoders(work: Path, out: Path, preset: Preset, ground: Ground, sprites: Sprites) -> None:
    """Trains the ground's decoder on, then the card's fast one from it; writes both into the model's folder ``out``."""
    drawn = as_drawn(ground, work / "drawn", LESSONS)
    folder = work / f"decoder-{fingerprint(drawn, ground.vae)}"
    refine_decoder(drawn, ground, sprites, folder, preset.decoder_steps)
    if PartialState().is_main_process:
        # Only training encodes: for a few hundredths of a latent's spread the package is 2 MB smaller.
        save_network(ground.vae, out / "vae/diffusion_pytorch_model.safetensors", coarse="encoder.")
    fast_decoder(work, out, preset, ground, drawn)


def fast_decoder(work: Path, out: Path, preset: Preset, ground: Ground, drawn: np.ndarray) -> None:
    """Trains the card's fast decoder from the ground's, and writes it into the model's folder ``out``."""
    config = ground.card.fast_decoder
    assert config
    folder = work / f"fast_decoder-{fingerprint(drawn, ground.vae)}"
    decoder = train_fast_decoder(drawn, ground.vae, config, folder, preset.fast_decoder_steps, ground.run)
    if PartialState().is_main_process:
        save_network(decoder, out / FAST_DECODER_FILE)
    PartialState().wait_for_everyone()


def ground_of(work: Path, model: Path, preset: Preset, scenes: int, run: Run) -> tuple[Ground, Sprites]:
    """What is learned from a finished model in the folder ``model``, instead of one that was trained here."""
    of_model = card(MODEL)
    networks = load_folder(model, of_model, run.device, torch.float32)
    data = Data.built(work, preset)
    latents = data.latents(networks.vae, of_model.native_shapes[0], scenes, work)
    ground = Ground(
        of_model, model / UNET_FILE, networks.tokenizers, networks.text_encoders, networks.vae, latents,
        preset.batch // 2, run,
    )  # fmt: skip
    return ground, data.sprites


def distil_from(work: Path, model: Path, out: Path, preset: Preset, run: Run) -> None:
    """Students of a finished model."""
    ground, _ = ground_of(work, model, preset, preset.scenes, run)
    distil_all(work, out, preset, ground)


def other_words_from(work: Path, model: Path, out: Path, preset: Preset, run: Run) -> None:
    """A finished model's text encoders taught other words; they and the tokenizer go to the folder ``out``."""
    ground, sprites = ground_of(work, model, preset, preset.scenes, run)
    words = wording(work, sprites, ground.tokenizers[0])
    other_words(work, words, model / "tokenizer", out, preset, ground, sprites)


def decoders_from(work: Path, model: Path, out: Path, preset: Preset, run: Run) -> None:
    """A finished model's decoder taught on, and a fast one from it."""
    ground, sprites = ground_of(work, model, preset, LESSONS, run)
    decoders(work, out, preset, ground, sprites)


def fast_decoder_from(work: Path, model: Path, out: Path, preset: Preset, run: Run) -> None:
    """A fast decoder for a finished model, from its decoder as it is."""
    ground, _ = ground_of(work, model, preset, PICTURES, run)
    fast_decoder(work, out, preset, ground, as_drawn(ground, work / "drawn", PICTURES))


def students_inside() -> dict[int, Files]:
    """Those of the package, as its card has them."""
    lightning = card(f"{MODEL}-lightning")
    return {n: locate(lightning, n) for n in sorted(lightning.schedules, reverse=True)}


def evaluate_in(work: Path, model: Path, students: dict[int, Files], preset: Preset, count: int, run: Run) -> None:
    """Prints what the model in a folder and its students get, and keeps it in ``work``."""
    of_model = card(MODEL)
    networks = load_folder(model, of_model, run.device, half(run.kind))
    sprites = Data.built(work, preset).sprites
    evaluation = Evaluation(of_model, networks, sprites, work / "evaluation", count, READER_STEPS, run)
    ways = ways_of(model / UNET_FILE, students)
    evaluate(evaluation, ways)
    closer = [way for way in ways if way.name in LOOKED_INTO]
    styles(evaluation, closer, EACH)
    arrangements(evaluation, closer, ARRANGED)
    negatives(evaluation, closer, EACH)
    wordings(evaluation, closer, wording(work, sprites, networks.tokenizers[0], held_out=True), WORDED)


def train(work: Path, out: Path, preset: Preset, run: Run) -> None:
    """Runs every stage in ``work``, each going on from where it was.

    Writes the model's folder ``out``, its students' beside it, and a card for each, ``fulgurite serve --cards``.
    Raises TimeIsUpError when the run's time is over.
    """
    of_model = card(MODEL)
    data = Data.built(work, preset)
    vocabulary = work / f"tokenizer-{fingerprint(data.sprites.things)}"
    if PartialState().is_main_process and not vocabulary.exists():
        with whole(vocabulary) as new:
            learn_vocabulary(work, data.sprites, of_model.text_encoders[0], new)
    PartialState().wait_for_everyone()
    tokenizer = Tokenizer.from_folder(vocabulary, of_model.text_encoders[0].max_position_embeddings)
    words = wording(work, data.sprites, tokenizer)

    vae = train_vae(data.sprites, of_model.vae, work / "vae", preset.vae_steps, run)
    normalize_latents(vae, to_pixels(render_pictures(data.sprites, 128, "normalize")).to(run.device))
    latents = data.latents(vae, of_model.native_shapes[0], preset.scenes, work)
    torch.set_float32_matmul_precision("high")
    said = examples(words, latents.scenes)
    folder = work / f"text-{fingerprint(vocabulary / 'vocab.json', words.thesaurus, said, latents.latents[:FEW])}"
    encoders = train_text_encoders(latents, data.sprites, words, of_model, folder, preset.text_steps, run)
    folder = work / f"teacher-{fingerprint(*encoders.values())}"
    unet = train_teacher(latents, words, of_model, encoders, folder, preset.teacher_steps, run, preset.batch)
    if PartialState().is_main_process:
        save_network(unet, out / UNET_FILE)
    PartialState().wait_for_everyone()
    tokenizers, text_encoders = (tokenizer, tokenizer), list(encoders.values())
    ground = Ground(of_model, out / UNET_FILE, tokenizers, text_encoders, vae, latents, preset.batch // 2, run)
    ground = other_words(work, words, vocabulary, out, preset, ground, data.sprites)
    decoders(work, out, preset, ground, data.sprites)
    preview = preview_lines(latents, data.sprites)
    if PartialState().is_main_process:
        write_card("spark.toml", out.with_name(f"{out.name}.toml"), out / UNET_FILE, preview=preview)
    distil_all(work, out.with_name(f"{out.name}-lightning"), preset, ground, preview)
