"""The recipe's parts: scenes and their captions, the tokenizer, the noise, and runs that go on where they stopped."""

import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import small_stage
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_ground import THESAURUS
from small_sdxl import FIRST, SECOND, UNET
from small_sdxl import VAE as SMALL_VAE
from small_stage import learned
from torch import nn
from typer.testing import CliRunner

from fulgurite.cards import card
from fulgurite.cli import app
from fulgurite.errors import FulguriteError
from fulgurite.models import VAE, CLIPTextEncoder, TinyDecoderConfig, Tokenizer, UNet, VAEConfig
from fulgurite.sampling import TRAIN_STEPS, to_denoised, train_sigmas
from fulgurite.training.fast_decoder import train_fast_decoder
from fulgurite.training.fingerprint import fingerprint
from fulgurite.training.latents import LatentSet, build_latents
from fulgurite.training.loop import Run, TimeIsUpError, learning_rate, save_network
from fulgurite.training.phrases import MORE_LINKS
from fulgurite.training.preview import fit_preview
from fulgurite.training.prompts import Wording
from fulgurite.training.scenes import (
    COLOURS,
    HUES,
    LINKS,
    STYLE_WORDS,
    caption,
    linked,
    name_of,
    plain,
    random_scene,
    recoloured,
    render,
)
from fulgurite.training.sources import SPRITE, Sprites, Thing, capped, hexcode
from fulgurite.training.teacher import initialize, noised, train_teacher
from fulgurite.training.text import NOTHING, Questions, Sketch, answers_of, train_text_encoders
from fulgurite.training.vae import crops, normalize_latents, to_pixels
from fulgurite.training.vocabulary import write_tokenizer
from fulgurite.training.words import SYNONYMS
from fulgurite.weights.load import load_vae

NAMES = ("rocket", "fox", "house", "tulip")


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Four things in two styles: discs of plain colours, so that what is drawn where can be read off."""
    discs = np.zeros((8, SPRITE, SPRITE, 4), np.uint8)
    y, x = np.mgrid[:SPRITE, :SPRITE] - SPRITE / 2
    for i, disc in enumerate(discs):
        disc[x**2 + y**2 < 110**2] = (220, 30 + 5 * i, 20, 255)
    things = [Thing(name, ("toy", "tag of " + name), {"3d": 2 * i, "flat": 2 * i + 1}) for i, name in enumerate(NAMES)]
    return Sprites(things, discs)


@given(st.integers(), st.sampled_from([(256, 256), (320, 192), (192, 320)]))
def test_a_scene_is_its_number_and_its_caption_says_what_is_there(
    sprites: Sprites, number: int, size: tuple[int, int]
) -> None:
    scene = random_scene(random.Random(number), sprites, size)
    assert scene == random_scene(random.Random(number), sprites, size)
    words = caption(scene, random.Random(number))
    for placed in scene.things:
        name = placed.thing.name
        assert any(word in words for word in (name, "toy", *SYNONYMS.get(name, ())))
        assert placed.colour is None or placed.colour in words
    if scene.background[-1] != "white":
        assert scene.background[-1] in words
    said = {style for style, forms in STYLE_WORDS.items() for form in forms if form in words.split(" of ")[0] + words}
    assert said <= {scene.style}


def test_a_rendered_scene_has_its_background_and_its_things(sprites: Sprites) -> None:
    rng = random.Random(1)
    for _ in range(20):
        scene = random_scene(rng, sprites, (320, 192))
        picture = render(scene, sprites)
        assert picture.shape == (192, 320, 3)
        assert tuple(picture[0, 0]) == COLOURS[scene.background[0]]
        assert tuple(picture[-1, -1]) == COLOURS[scene.background[-1]]
        for placed in scene.things:
            if placed.colour is None:
                x, y = round(placed.centre[0] * 320), round(placed.centre[1] * 192)
                expected = sprites.pixels[placed.sprite][SPRITE // 2, SPRITE // 2, :3]
                assert abs(picture[y, x].astype(int) - expected).max() <= 2


def test_a_caption_may_say_the_kind_of_thing_but_no_other_tag(sprites: Sprites) -> None:
    said = [name_of(sprites.things[0], random.Random(number)) for number in range(500)]
    assert 20 <= said.count("toy") <= 70
    assert not any("tag" in name for name in said)


def test_prompts_that_name_no_style_are_mostly_of_one_in_other_words_too(sprites: Sprites, tmp_path: Path) -> None:
    write_tokenizer(sprites, FIRST.vocab_size, tmp_path)
    wording = Wording(THESAURUS, Tokenizer.from_folder(tmp_path, 60))
    scenes = [random_scene(random.Random(number), sprites) for number in range(400)]
    unsaid = [scene.style for i, scene in enumerate(scenes) if not wording.said(scene, random.Random(i))[1].styled]
    assert len(unsaid) > 100
    assert unsaid.count("3d") > 0.85 * len(unsaid)


def test_two_things_stand_where_their_arrangement_says(sprites: Sprites) -> None:
    seen = set()
    for number in range(300):
        scene = random_scene(random.Random(number), sprites)
        if scene.arrangement:
            seen.add(scene.arrangement)
            (x, y), (other_x, other_y) = (placed.centre for placed in scene.things)
            assert {"beside": x < other_x, "upon": y < other_y, "before": y > other_y}[scene.arrangement]
    assert seen == {"beside", "upon", "before"}


def test_of_two_things_the_first_hides_some_of_the_second(sprites: Sprites) -> None:
    scenes = (random_scene(random.Random(number), sprites) for number in range(500))
    before = next(s for s in scenes if s.arrangement == "before" and not any(p.colour for p in s.things))
    first, second = before.things
    turned = replace(before, things=(replace(first, sprite=second.sprite), replace(second, sprite=first.sprite)))
    x, y = (round(256 * share) for share in first.centre)
    colours = [sprites.pixels[placed.sprite][SPRITE // 2, SPRITE // 2, :3] for placed in before.things]
    for scene, colour in zip((before, turned), colours, strict=True):
        assert abs(render(scene, sprites)[y, x].astype(int) - colour).max() <= 2


@given(st.integers())
def test_what_stands_between_two_names_says_how_the_things_stand(sprites: Sprites, number: int) -> None:
    rng = random.Random(number)
    scene = next(s for s in iter(lambda: random_scene(rng, sprites), None) if s.arrangement)
    first, second = (plain(placed.thing.name) for placed in scene.things)
    for links in (LINKS, MORE_LINKS):
        onward, back = links[scene.arrangement]
        said = {f"{first} {link} {second}" for link in onward} | {f"{second} {link} {first}" for link in back}
        assert linked(scene, [first, second], links, rng) in said


def test_no_words_between_two_names_mean_two_arrangements() -> None:
    every = [link for links in (LINKS, MORE_LINKS) for both in links.values() for side in both for link in set(side)]
    assert len(every) == len(set(every))


def test_where_there_is_one_thing_scenes_hold_one(sprites: Sprites) -> None:
    alone = replace(sprites, things=sprites.things[:1])
    assert all(len(random_scene(random.Random(number), alone).things) == 1 for number in range(50))


@pytest.mark.parametrize("colour", HUES)
def test_turning_hues_gives_the_colour_asked_for(sprites: Sprites, colour: str) -> None:
    from PIL import Image

    sprite = Image.fromarray(sprites.pixels[0])
    hue = np.asarray(recoloured(sprite, colour).convert("RGB").convert("HSV"))[SPRITE // 2, SPRITE // 2, 0]
    away = abs(int(hue) - HUES[colour] * 255 // 360)
    assert min(away, 256 - away) <= 8


def test_the_answers_of_a_scene_are_among_those_the_encoders_are_taught(sprites: Sprites) -> None:
    rng = random.Random(2)
    scenes = [random_scene(rng, sprites) for _ in range(50)]
    questions = Questions(8, sprites)
    targets = questions.targets(scenes)
    for i, scene in enumerate(scenes):
        said = {name: answers[targets[name][i]] for name, answers in questions.answers.items()}
        assert said == answers_of(scene)
        assert (said["second"] == NOTHING) == (len(scene.things) == 1)
    assert questions.loss(torch.randn(50, 8), targets).isfinite()


def test_a_sketch_lays_the_last_states_out_over_the_latent_row_by_row() -> None:
    sketch = Sketch(1, (2, 8, 8))
    nn.init.ones_(sketch.linear.weight)
    nn.init.zeros_(sketch.linear.bias)
    drawn = sketch(torch.arange(20.0)[None, :, None])  # the first four states are the prompt's
    assert torch.equal(drawn[0, 1, ::2, ::2], torch.arange(4.0, 20.0).view(4, 4))
    assert torch.equal(drawn[0, 0], drawn[0, 1])


def test_text_encoders_learn_what_and_where(sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_model = replace(card("fulgurite/spark"), unet=replace(UNET, pooled_dim=48), text_encoders=(FIRST, SECOND))
    write_tokenizer(sprites, FIRST.vocab_size, tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, 60)
    scenes = [random_scene(random.Random(number), sprites) for number in range(4)]
    latents = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float16)
    shown, wording = LatentSet((256, 256), latents, scenes), Wording(THESAURUS, tokenizer)
    monkeypatch.setattr("fulgurite.training.text.BATCH", 8)
    train_text_encoders(shown, sprites, wording, of_model, tmp_path / "run", steps=100)
    first, last = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert last["questions"] < 0.8 * first["questions"]
    assert last["sketch"] < first["sketch"]


def test_the_learned_tokenizer_is_clips_and_keeps_common_words_whole(sprites: Sprites, tmp_path: Path) -> None:
    write_tokenizer(sprites, 1000, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(1000))
    tokenizer = Tokenizer.from_folder(tmp_path, 32)
    ids = tokenizer(["a rocket on a blue background"])[0].tolist()
    words = ["<|startoftext|>", "a</w>", "rocket</w>", "on</w>", "a</w>", "blue</w>", "background</w>"]
    assert ids[:8] == [*(vocab[word] for word in words), vocab["<|endoftext|>"]]


def test_what_is_to_be_predicted_gives_the_clean_latent_back() -> None:
    """Training's noise and sampling's arithmetic are inverse to each other, or no model would come of it."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 4, 5, 5, generator=generator)
    timesteps, sigmas = torch.tensor([0, 1, 250, 500, 900, 998]), train_sigmas()
    x, v = noised(clean, timesteps, noise, sigmas)
    sigma = sigmas[timesteps]
    unscaled = x * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(to_denoised(v, unscaled, sigma, "v"), clean, atol=1e-4, rtol=1e-4)


def test_the_last_timestep_shows_noise_alone() -> None:
    noise, sigmas = torch.ones(1, 1, 2, 2), train_sigmas()
    last = torch.tensor([TRAIN_STEPS - 1])
    x, _ = noised(torch.full((1, 1, 2, 2), 9.0), last, noise, sigmas)
    again, _ = noised(torch.full((1, 1, 2, 2), -9.0), last, noise, sigmas)
    assert torch.equal(x, again)


def test_normalizing_gives_latents_of_unit_scale_and_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae, pixels = VAE(card("fulgurite/spark").vae).eval(), torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        before = vae.decode(vae.encode(pixels)[0])
        normalize_latents(vae, pixels)
        latents, _ = vae.encode(pixels)
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-3, rtol=0)
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-3, rtol=0)
        torch.testing.assert_close(vae.decode(latents), before, atol=1e-3, rtol=1e-3)


def test_a_preview_is_the_linear_map_from_latents_to_their_cells_colours() -> None:
    numbers = torch.Generator().manual_seed(0)
    latents, true = torch.randn(4, 5, 6, 8, generator=numbers), torch.randn(6, 3, generator=numbers)
    cells = torch.einsum("nchw,cd->ndhw", latents, true[:-1]) + true[-1][:, None, None]
    fine = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found, explained = fit_preview(latents, fine)
    torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)
    assert explained == pytest.approx(1)
    noise = cells.std() * torch.randn(cells.shape, generator=numbers)
    noisy = fine + noise.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert fit_preview(latents, noisy)[1] == pytest.approx(0.5, abs=0.1)


def test_an_encoder_kept_in_eight_bits_is_read_back_near_what_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    of_model = replace(card("fulgurite/spark"), vae=SMALL_VAE)
    vae, half, coarse = VAE(SMALL_VAE), tmp_path / "half.safetensors", tmp_path / "coarse.safetensors"
    save_network(vae, half)
    save_network(vae, coarse, coarse="encoder.")
    assert coarse.stat().st_size < half.stat().st_size
    again = load_vae(coarse, of_model, "cpu", torch.float32).state_dict()
    for name, tensor in vae.state_dict().items():
        in_eight = name.startswith("encoder.") and tensor.ndim == 4
        torch.testing.assert_close(
            again[name], tensor, rtol=2**-4 if in_eight else 2**-11, atol=2**-10 if in_eight else 1e-7
        )


def test_crops_are_parts_of_the_pictures() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 100, 100, 3), np.uint8)
    (crop,) = crops(random.Random(0), pictures, 1)
    whole = to_pixels(pictures)
    assert any(torch.equal(crop, p[:, y : y + 96, x : x + 96]) for p in whole for y in range(5) for x in range(5))


def test_a_stage_that_stopped_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    whole = learned(tmp_path / "whole", 20)
    learned(tmp_path / "parts", 9)
    parts = learned(tmp_path / "parts", 20)
    for a, b in zip(whole.average.parameters(), parts.average.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert learned(tmp_path / "whole", 20).step == 20


def test_several_processes_learn_what_one_does_from_all_their_batches(tmp_path: Path) -> None:
    """Two go on from where one stopped, and one from where they did; each of the two keeps a part of the optimizer."""
    learned(tmp_path / "turns", 8)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", small_stage.__file__]
    command = [sys.executable, *two, str(tmp_path / "turns"), "14"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    assert sorted(told.splitlines()) == ["2 processes, 1 of 4 optimized", "2 processes, 3 of 4 optimized"]
    whole, turns = learned(tmp_path / "whole", 20), learned(tmp_path / "turns", 20)
    for one, other in zip(whole.average.parameters(), turns.average.parameters(), strict=True):
        torch.testing.assert_close(other, one)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates.index(max(rates)) == pytest.approx(100, abs=2)
    assert rates[0] < 0.02
    assert rates[-1] < 1e-4


def test_groups_of_people_are_thinned_to_a_fifth() -> None:
    """But for those that are asked for often."""
    shrugs, foods = [{"group": 0, "label": f"shrug {i}"} for i in range(300)], [{"group": 1, "label": "soup"}] * 100
    asked_for = {"group": 0, "label": "astronaut"}
    kept = capped([*shrugs[:1], asked_for, *shrugs[1:], *foods], {"0": "people-body", "1": "food-drink"})
    assert sum(entry["group"] == 1 for entry in kept) == 100
    assert asked_for in kept
    assert 15 <= sum(entry["group"] == 0 for entry in kept) <= 26


def test_one_spelling_of_code_points() -> None:
    assert hexcode("2764-FE0F-200D-1F525") == hexcode("2764-200d-1f525") == "2764-200d-1f525"


def test_a_built_folder_opens_with_the_things_asked_for(sprites: Sprites, tmp_path: Path) -> None:
    np.save(tmp_path / "sprites.npy", sprites.pixels)
    (tmp_path / "things.json").write_text(json.dumps([asdict(thing) for thing in sprites.things]))
    assert Sprites.open(tmp_path).things == sprites.things
    assert [thing.name for thing in Sprites.open(tmp_path, frozenset({"fox"})).things] == ["fox"]
    with pytest.raises(FulguriteError, match=f"{re.escape(str(tmp_path))} is without yak: delete it"):
        Sprites.open(tmp_path, frozenset({"fox", "yak"}))


def test_a_fingerprint_is_of_what_is_in_files_and_networks_not_of_where_they_are(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for path in (one, same, other):
        path.write_text("words" if path != other else "other words")
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    layer, again = nn.Linear(2, 3).bfloat16(), nn.Linear(2, 3).bfloat16()
    assert fingerprint(layer) != fingerprint(again)
    again.load_state_dict(layer.state_dict())
    assert fingerprint(layer, 1) == fingerprint(again, 1) != fingerprint(again, 2)
    zeros = np.zeros(5000)
    other = zeros.copy()
    other[2500] = 1  # where the words for a long array leave it out
    assert fingerprint(zeros) == fingerprint(zeros.copy()) != fingerprint(other)


def test_latents_of_other_things_or_of_another_encoder_are_made_anew(
    sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fulgurite.training.latents.workers", lambda count: ThreadPoolExecutor(1))
    monkeypatch.setattr("fulgurite.training.latents.encode_scenes", lambda *_: np.zeros((2, 4, 8, 8)))
    np.save(tmp_path / "sprites.npy", sprites.pixels)
    (tmp_path / "things.json").write_text(json.dumps([asdict(thing) for thing in sprites.things]))
    vae, made = VAE(SMALL_VAE).eval(), []
    taught_on = deepcopy(vae)
    taught_on.decoder = VAE(SMALL_VAE).decoder
    for names, autoencoder in (
        (None, vae),
        (None, taught_on),
        (frozenset({"fox", "house"}), vae),
        (None, VAE(SMALL_VAE).eval()),
    ):
        latents = build_latents(tmp_path, names, autoencoder, (64, 64), 2, tmp_path / "latents")
        made.append(len(list((tmp_path / "latents").iterdir())))
        assert latents.latents.shape[0] == len(latents.scenes) == 2
    assert made == [1, 1, 2, 3]


def test_several_processes_do_not_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for others that do not evaluate."""
    pytest.importorskip("resvg_py")
    monkeypatch.setattr("fulgurite.training.recipe.train", lambda work, out, preset, run: None)
    monkeypatch.setattr("fulgurite.cli_training.processes", lambda: 2)
    out = tmp_path / "here/spark"
    trained = CliRunner().invoke(app, ["train", "recipe", str(tmp_path), "--out", str(out), "--prompts", "300"])
    assert trained.exit_code == 0
    told = " ".join(trained.output.split())
    assert f"train evaluate {tmp_path} --model {out} --students {out}-lightning" in told
    assert "--prompts 300" in told
    refused = CliRunner().invoke(app, ["train", "evaluate", str(tmp_path)])
    assert (refused.exit_code, "one process" in refused.output) == (1, True)


def test_the_train_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    wrong = CliRunner().invoke(app, ["train", "recipe", str(tmp_path), "--preset", "tpu"])
    assert (wrong.exit_code, "there are cpu and gpu" in wrong.output) == (1, True)
    missing = CliRunner().invoke(app, ["train", "recipe", str(tmp_path)])
    assert (missing.exit_code, "npm, which is not installed" in missing.output) == (1, True)


def test_a_run_whose_minutes_are_over_says_so_to_people_and_to_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.chdir(tmp_path)

    def stops(work: Path, model: Path, out: Path, preset: object, run: Run) -> None:
        assert (run.device, run.over()) == ("cpu", False)
        raise TimeIsUpError("The time is up, at step 7 of 9 of the stage 4.")

    monkeypatch.setattr("fulgurite.training.recipe.distil_from", stops)
    stopped = CliRunner().invoke(app, ["train", "distil", str(tmp_path), "--minutes", "10"])
    assert stopped.exit_code == 3
    assert "at step 7 of 9 of the stage 4. The same command goes on there." in stopped.output


def test_the_teacher_learns_pictures_by_their_words(sprites: Sprites, tmp_path: Path) -> None:
    """Two plain latents, and captions that tell them apart: in seconds, some of what can be known is."""
    of_model = replace(card("fulgurite/spark"), unet=UNET, text_encoders=(FIRST, SECOND))
    write_tokenizer(sprites, FIRST.vocab_size, tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, 24)
    torch.manual_seed(0)
    encoders = nn.ModuleDict({"text_encoder": CLIPTextEncoder(FIRST), "text_encoder_2": CLIPTextEncoder(SECOND)})
    scenes = [random_scene(random.Random(number), sprites) for number in (1, 2)]
    latents = np.stack([np.full((4, 8, 8), value, np.float16) for value in (-1, 1)])
    shown = LatentSet((256, 256), latents, scenes)
    wording = Wording(THESAURUS, tokenizer)
    learned = train_teacher(shown, wording, of_model, encoders, tmp_path / "run", steps=200, batch=4)
    assert isinstance(learned, UNet)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [50, 100, 150, 200]
    assert log[3]["v"] < 0.8 * log[0]["v"]


def test_a_fast_decoder_learns_what_the_full_one_says_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5)).eval()
    config = TinyDecoderConfig(block_out_channels=(16, 16, 16), num_blocks=(1, 1, 0))
    plain = np.random.default_rng(0).standard_normal((6, 4, 1, 1)).astype(np.float16)
    latents = np.broadcast_to(plain, (6, 4, 4, 4)).copy()
    train_fast_decoder(latents, vae, config, tmp_path, steps=150)
    learned = train_fast_decoder(latents, vae, config, tmp_path, steps=400)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(50, 401, 50))
    assert log[-1]["squared"] < 0.2 * log[0]["squared"]
    with torch.inference_mode():
        x = torch.from_numpy(latents).float()
        wanted = vae.decode(x / 0.5).clamp(-1, 1)
        error = (learned(x) - wanted).square().mean()
    assert error < 0.5 * (wanted - wanted.mean()).square().mean()


def test_a_teacher_starts_silent() -> None:
    unet = UNet(UNET).eval()
    initialize(unet)
    with torch.inference_mode():
        x = torch.randn(2, 4, 8, 8)
        out = unet(
            x, torch.tensor([3, 900]), torch.randn(2, 5, UNET.cross_attention_dim), torch.randn(2, UNET.pooled_dim),
            torch.zeros(2, 6),
        )  # fmt: skip
    assert torch.equal(out, unet.conv_out.bias.detach()[None, :, None, None].expand_as(out))
