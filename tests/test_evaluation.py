"""The evaluation: chunks that are drawn once, ways as the students' files say, negative prompts, held-out pairs."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_weights
from safetensors.torch import save_file
from small_sdxl import FIRST, SECOND, UNET, roughened, write_tokenizer
from small_sdxl import VAE as SMALL_VAE

from fulgurite.cards import card
from fulgurite.models import VAE, CLIPTextEncoder, Tokenizer, UNet
from fulgurite.training.evaluation import negatives, reader, scores
from fulgurite.training.evaluation.arrangements import arrangements
from fulgurite.training.evaluation.negatives import common_kinds
from fulgurite.training.evaluation.reader import scenes_of
from fulgurite.training.evaluation.scores import Evaluation, Way, evaluate, ways_of
from fulgurite.training.evaluation.styles import styles
from fulgurite.training.evaluation.wordings import wordings
from fulgurite.training.latents import scene_at
from fulgurite.training.loop import Run, TimeIsUpError
from fulgurite.training.precision import half
from fulgurite.training.prompts import Wording
from fulgurite.training.recipe import students_inside
from fulgurite.training.scenes import LINKS, Scene, held_out_style, places
from fulgurite.training.sources import SPRITE, Sprites, Thing
from fulgurite.training.students import students_in
from fulgurite.training.thesaurus import Thesaurus
from fulgurite.weights import Networks

CARD = replace(
    card("fulgurite/spark"), unet=UNET, vae=SMALL_VAE, text_encoders=(FIRST, SECOND), native_shapes=((64, 64),)
)
THINGS = ("rocket", "fox", "tulip", "castle", "robot", "banana", "house", "star", "crab", "owl", "lemon", "ghost")


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    things = [Thing(name, (), {"3d": 0, "cartoon": 0}) for name in THINGS]
    return Sprites(things, np.full((1, SPRITE, SPRITE, 4), 200, np.uint8))


@pytest.fixture
def evaluation(sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setattr(reader, "PICTURES", 130)
    for name, value in {"REFERENCE": 12, "CHUNK": 4, "BATCH": 3, "AMONG": 5}.items():
        monkeypatch.setattr(scores, name, value)
    return an_evaluation(sprites, tmp_path, Run())


def an_evaluation(sprites: Sprites, folder: Path, run: Run, tokens: int = 24) -> Evaluation:
    """``tokens``: how many the model under evaluation reads of a prompt."""
    torch.manual_seed(0)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder, tokens)
    save_file(dict(roughened(UNet(UNET)).state_dict()), folder / "unet.safetensors")
    networks = Networks(
        (tokenizer, tokenizer), tuple(CLIPTextEncoder(config).to(half("cpu")).eval() for config in (FIRST, SECOND)),
        UNet(UNET), VAE(SMALL_VAE).to(half("cpu")).eval(), "v",
    )  # fmt: skip
    return Evaluation(CARD, networks, sprites, folder / "evaluation", 10, 1, run)


def test_a_chunk_is_drawn_once_whatever_stops_a_run(evaluation: Evaluation, sprites: Sprites, tmp_path: Path) -> None:
    way = Way("teacher, 2 steps", tmp_path / "unet.safetensors", (), 2, guided=True)
    whole = evaluate(evaluation, [way])
    assert [(s.name, s.pictures) for s in whole] == [("renders", 10), ("renders, autoencoded", 10), (way.name, 10)]
    [kept_in] = (tmp_path / "evaluation").glob("teacher-2-steps-*")
    chunks = sorted(kept_in.iterdir())
    assert [path.name for path in chunks] == ["0-4.npy", "4-8.npy", "8-10.npy"]
    kept = np.load(chunks[1])
    chunks[1].unlink()
    with pytest.raises(TimeIsUpError, match="at picture 4 of 10 of: teacher, 2 steps"):
        evaluate(an_evaluation(sprites, tmp_path, Run(until=0)), [way])
    assert evaluate(evaluation, [way]) == whole
    np.testing.assert_array_equal(np.load(chunks[1]), kept)
    table = (tmp_path / "evaluation/scores.md").read_text().splitlines()
    assert len(table) == 2 + 3


def test_a_part_of_a_table_is_made_once_whatever_stops_a_run(
    evaluation: Evaluation, sprites: Sprites, tmp_path: Path
) -> None:
    made: list[str] = []

    def make(name: str) -> list[str]:
        made.append(name)
        return [f"| {name} | 1 |"]

    parts = {(name, "1a"): partial(make, name) for name in ("one", "two, twice")}
    evaluation.table("things", ("name", "count"), {("one", "1a"): parts["one", "1a"]})
    with pytest.raises(TimeIsUpError, match="at two, twice of things"):
        an_evaluation(sprites, tmp_path, Run(until=0)).table("things", ("name", "count"), parts)
    table = evaluation.table("things", ("name", "count"), parts)
    assert table.splitlines() == ["| name | count |", "|---|---|", "| one | 1 |", "| two, twice | 1 |"]
    assert made == ["one", "two, twice"]
    evaluation.table("things", ("name", "count"), {("one", "2b"): partial(make, "one")})
    assert made == ["one", "two, twice", "one"]  # of other weights


def test_what_is_kept_of_other_weights_is_not_used(evaluation: Evaluation, sprites: Sprites, tmp_path: Path) -> None:
    way = Way("student, 2 steps", tmp_path / "unet.safetensors", (), 2, guided=False)
    before = evaluate(evaluation, [way])
    torch.manual_seed(1)
    save_file(dict(roughened(UNet(UNET)).state_dict()), way.unet)
    after = evaluate(evaluation, [way])
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_ways_are_what_the_files_say(tmp_path: Path) -> None:
    files = [
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
        "text_encoder_2/model",
    ]
    for name in (*files, "guided_lora", "4step_lora", "2step_unet"):
        (tmp_path / f"{name}.safetensors").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").touch()
    unet = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    ways = {way.name: way for way in ways_of(unet, students_in(tmp_path, unet))}
    assert [way.steps for way in ways.values() if way.guided] == [32, 20, 8, 4, 2, 1]
    assert ways["student, 2 steps"].unet == tmp_path / "2step_unet.safetensors"
    assert [path.stem for path in ways["student, 4 steps"].loras] == ["guided_lora", "4step_lora"]
    assert [path.stem for path in ways["student, 1 step"].loras] == ["guided_lora"]


@needs_weights
def test_the_students_inside_are_those_that_the_card_serves() -> None:
    assert list(students_inside()) == [8, 4, 2, 1]
    assert all(path.exists() for files in students_inside().values() for path in files.loras)


def test_negative_prompts_are_asked_where_kinds_leave_a_choice() -> None:
    tags = [("animal", "pet", "red"), ("animal", "pet"), ("animal", "red", "red"), ("red",)]  # red is no kind
    assert common_kinds([Thing(str(i), of, {}) for i, of in enumerate(tags)]) == ["animal"]


@pytest.mark.parametrize("guided", [True, False])
def test_what_a_negative_prompt_takes_away_is_counted(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guided: bool
) -> None:
    """It sees a tulip where a seed's picture is as without the negative prompt, else by turns rose and fox.

    So the rows with it would not fall to none if it were ignored.
    """
    names, flowers = ("fox", "rose", "tulip", "lily"), ("flower",)
    things = [Thing(name, () if name == "fox" else flowers, {}) for name in names]
    monkeypatch.setattr(evaluation, "sprites", Sprites(things, evaluation.sprites.pixels))
    shown: list[torch.Tensor] = []

    def features(pictures: torch.Tensor) -> torch.Tensor:
        shown.append(pictures)
        same = [torch.equal(now, plain) for now, plain in zip(pictures, shown[0], strict=True)]
        return torch.eye(4)[[2 if same[i] else i % 2 for i in range(len(same))]]

    reader = SimpleNamespace(pictures=features, captions=lambda said: said, likeness=lambda seen, said: seen)
    monkeypatch.setattr(evaluation, "reader", reader)
    table = negatives.negatives(evaluation, [Way("way", tmp_path / "unet.safetensors", (), 2, guided)], 4)
    rows = [line.split(" | ")[:4] for line in table.splitlines()[2:]]
    assert rows == [
        ["| way, no negative prompt", "4", "100 % (51 to 100)", "100 % (51 to 100)"],
        *(
            [f"| way, strength {strength}", "4", "0 % (0 to 49)", "50 % (15 to 85)"]
            for strength in ("3", "5", "9", "3, unrelated")
        ),
    ]


def test_models_that_read_otherwise_have_the_same_evaluator(
    evaluation: Evaluation, sprites: Sprites, tmp_path: Path
) -> None:
    other = an_evaluation(sprites, tmp_path, Run(), tokens=12)
    assert torch.equal(other.said, evaluation.said)
    assert not torch.equal(other.say(["a fox"], (64, 64)).context, evaluation.say(["a fox"], (64, 64)).context)


def test_no_scene_is_composed_as_those_that_models_are_scored_by(sprites: Sprites) -> None:
    training = [scene_at(sprites, (256, 256), number) for number in range(300)]
    reader_s = scenes_of(sprites, "reader", 300, held_out=False)
    scored = scenes_of(sprites, "captions", 300, held_out=True)

    def composed(scene: Scene) -> tuple[object, ...]:
        things = tuple((placed.thing.name, placed.colour) for placed in scene.things)
        return things, scene.background, scene.arrangement

    shown = set(map(composed, training + reader_s))
    assert not shown & set(map(composed, scored))
    alone = {(((name, None),), ("white",), None) for name in THINGS}
    assert alone <= shown


def test_pairs_that_are_held_out_are_shown_in_no_training_scene(sprites: Sprites) -> None:
    pairs = {(thing.name, style) for thing in sprites.things if (style := held_out_style(thing))}
    assert 0 < len(pairs) <= len(THINGS) / 2
    assert {style for _, style in pairs} == {"cartoon"}  # each is shown in its other style
    training = [scene_at(sprites, (256, 256), number) for number in range(300)]
    seen = {(placed.thing.name, scene.style) for scene in training for placed in scene.things}
    assert not seen & pairs
    assert {name for name, _ in seen} == set(THINGS)


def test_things_that_stand_as_asked_are_counted(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a reader of numbers, each a name's; of a model that takes "on" for "and", and foxes for crabs."""
    names: list[str] = []
    foxes: list[tuple[int, int, int]] = []  # of each arrangement: as the first, as the second, as either

    def number(name: str) -> int:
        if name not in names:
            names.append(name)
        return names.index(name)

    def pictures(unet: UNet, way: Way, texts: list[str], seeds: range) -> torch.Tensor:
        shown = torch.full((len(texts), 3, SPRITE, SPRITE), -1.0)
        [(arrangement, link)] = {(a, onward[0]) for a, (onward, _) in LINKS.items() if f" {onward[0]} " in texts[0]}
        things = [text.split(f" {link} ") for text in texts]
        first, second = ({i for i, both in enumerate(things) if both[which] == "a fox"} for which in (0, 1))
        foxes.append((len(first), len(second), len(first | second)))
        for picture, both in zip(shown, things, strict=True):
            for name, (centre, _) in zip(both, places({"upon": "beside"}.get(arrangement, arrangement)), strict=True):
                x, y = (round(share * SPRITE) for share in centre)
                picture[:, y - 9 : y + 9, x - 9 : x + 9] = number(name.replace("fox", "crab"))
        return shown

    reader = SimpleNamespace(
        pictures=lambda x: x[:, 0, 32, 32],
        captions=lambda texts: torch.tensor([number(text) for text in texts]),
        likeness=lambda shown, said: -(shown[:, None] - said).abs(),
    )
    monkeypatch.setattr(evaluation, "pictures", pictures)
    monkeypatch.setattr(evaluation, "network", lambda way: way)
    monkeypatch.setattr(evaluation, "reader", reader)
    nothing = torch.zeros(40, 3, SPRITE, SPRITE)
    monkeypatch.setattr("fulgurite.training.evaluation.arrangements.rendered", lambda scenes, sprites: nothing)
    rows = arrangements(evaluation, [Way("way", tmp_path / "unet.safetensors", (), 2, guided=True)], 40).splitlines()
    parts = [[part.split(" (")[0] for part in row.strip("| ").split(" | ")] for row in rows]
    found = {name: shares for name, _, *shares in parts[2:]}
    assert found["way, on"][2] == "0 %"
    for name, missed in (("way, and", foxes[0]), ("way, in front of", foxes[2])):
        assert min(missed) > 0
        assert found[name] == [f"{100 * (40 - fox) / 40:.0f} %" for fox in missed]


def test_styles_that_come_are_counted(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluator that goes by the darkest of a picture: each pair's sprite is a grey of its own.

    But held-out pairs are as dark as the pair of the same thing that is shown; and what is drawn is no pair at all.
    """
    things = [
        replace(thing, sprites={"3d": 2 * i, "cartoon": 2 * i + 1}) for i, thing in enumerate(evaluation.sprites.things)
    ]
    greys = np.arange(2 * len(things)) * 8
    for thing in things:
        if style := held_out_style(thing):
            greys[thing.sprites[style]] = greys[thing.sprites["3d"]]
    pixels = np.broadcast_to(greys[:, None, None, None], (len(greys), SPRITE, SPRITE, 4)).astype(np.uint8)
    pixels = np.concatenate([pixels[..., :3], np.full_like(pixels[..., :1], 255)], axis=-1)
    monkeypatch.setattr(evaluation, "sprites", Sprites(things, pixels))

    def likeness(darkest: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        return -(darkest[:, None] - torch.arange(len(said)) * 8 / 127.5 + 1).abs()

    reader = SimpleNamespace(pictures=lambda x: x.amin(dim=(1, 2, 3)), captions=lambda said: said, likeness=likeness)
    monkeypatch.setattr(evaluation, "reader", reader)
    pairs = len([thing for thing in things if held_out_style(thing)])
    rows = styles(evaluation, [Way("way", tmp_path / "unet.safetensors", (), 2, guided=True)], 3).splitlines()[2:]
    assert [row.split(" (")[0] for row in rows[:2]] == [
        f"| renders, held out | {pairs} | {pairs} | 0 %",
        f"| renders, shown | {pairs} | {pairs} | 100 %",
    ]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| way, held out", "| way, shown"]
    assert (tmp_path / "evaluation/styles.md").read_text().splitlines()[2:] == rows


def test_prompts_in_other_words_are_held_against_their_scenes_captions(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures here are the numbers of their seeds, but those of prompts that name a vixen or have more words."""
    tokenizer = Tokenizer.from_folder(tmp_path, 100)
    wording = Wording(Thesaurus((), {"fox": ("vixen",)}, ("qqq",), ("qqq",), ("qqqing",)), tokenizer)
    drawn: list[str] = []

    def pictures(unet: UNet, way: Way, texts: list[str], seeds: range) -> torch.Tensor:
        drawn.extend(texts)
        numbers = [(seed + ("vixen" in text or "qqq" in text)) % 50 for seed, text in zip(seeds, texts, strict=True)]
        return torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 3, 64, 64)

    reader = SimpleNamespace(
        pictures=lambda x: x[:, 0, 0, 0],
        captions=lambda texts: torch.arange(len(texts)),
        likeness=lambda shown, said: -(shown[:, None] - said).abs(),
    )
    monkeypatch.setattr(evaluation, "pictures", pictures)
    monkeypatch.setattr(evaluation, "network", lambda way: None)
    monkeypatch.setattr(evaluation, "reader", reader)
    evaluation.scenes = scenes_of(evaluation.sprites, "wordings", 50, held_out=True)
    rows = wordings(evaluation, [Way("way", tmp_path / "unet.safetensors", (), 2, guided=True)], wording, 500)
    missed = [sum("vixen" in text or "qqq" in text for text in drawn[i : i + 50]) for i in (0, 50, 100)]
    assert 0 == missed[0] < missed[1] <= missed[2]
    assert [row.split(" (")[0] for row in rows.splitlines()[2:]] == [
        "| way, captions | 50 | 100 %",
        f"| way, other names | 50 | {100 - 2 * missed[1]} %",
        f"| way, other names, and words that say nothing | 50 | {100 - 2 * missed[2]} %",
    ]


def test_an_evaluator_of_another_tokenizer_is_another(
    evaluation: Evaluation, sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_shipped = reader.tokenizer_folder()
    shutil.copytree(of_shipped, tmp_path / "other")
    (tmp_path / "other/merges.txt").write_text((of_shipped / "merges.txt").read_text().rpartition("\n")[0])
    monkeypatch.setattr(reader, "tokenizer_folder", lambda: tmp_path / "other")
    assert len(list((tmp_path / "evaluation").glob("reader-*"))) == 1
    an_evaluation(sprites, tmp_path, Run())
    assert len(list((tmp_path / "evaluation").glob("reader-*"))) == 2


def test_a_close_up_is_a_part_of_the_picture_as_it_is_at_a_place_of_its_numbers() -> None:
    across, down = torch.meshgrid(torch.arange(320), torch.arange(256), indexing="xy")
    pictures = torch.stack([across, down, across]).expand(6, 3, 256, 320)
    parts = reader.close_up(pictures, 3)
    assert parts.shape == (6, 3, 64, 64)
    for left, top in parts[:, :2, 0, 0].tolist():
        assert (64 <= left <= 192, 48 <= top <= 144) == (True, True)  # about the middle
    assert torch.equal(parts - parts[:, :, :1, :1], (pictures - pictures[:, :, :1, :1])[:, :, :64, :64])
    assert len({tuple(place) for place in parts[:, :2, 0, 0].tolist()}) == 6
    assert torch.equal(reader.close_up(pictures[2:], 5), parts[2:])
