"""Prompts in other words: WordNet's names, what is said of a scene, the tokenizer that grows, encoders that learn."""

import json
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_weights
from hypothesis import given
from hypothesis import strategies as st
from small_ground import NOTHING, THESAURUS, small_ground, small_sprites

from fulgurite import Pipeline
from fulgurite.models import Tokenizer
from fulgurite.models.tokenizer import words_of
from fulgurite.training import thesaurus as thesaurus_module
from fulgurite.training.distil import Ground
from fulgurite.training.other_words import Encoders, begin, evenly, teach_other_words, understood
from fulgurite.training.phrases import MORE_NAMES, MORE_STYLES, SHADES
from fulgurite.training.prompts import Wording, held_out_word
from fulgurite.training.recipe import PRESETS, other_words
from fulgurite.training.scenes import STYLE_WORDS, names_of, random_scene
from fulgurite.training.thesaurus import Thesaurus, WordNet, ing, plural
from fulgurite.training.vocabulary import add_words, grow, write_vocabulary
from fulgurite.training.words import FIRST


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("ground")
    small_ground(folder)
    return Tokenizer.from_folder(folder, 200)


def synset(number: int, words: str, *above: int) -> str:
    """A line of WordNet's data.noun: its number, its words, and what it is a kind of."""
    named = words.split()
    pointers = "".join(f" @ {n:08} n 0000" for n in above)
    return (
        f"{number:08} 05 n {len(named):02x} " + " ".join(f"{w} 0" for w in named) + f" {len(above):03}{pointers} | .\n"
    )


ALL = "animal", "pug", "whelp", "coydog", "poodle", "dog", "tuna", "wolf", "run", "grim"
COUNTS = {word: 100 + 10 * i for i, word in enumerate(ALL)}


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    """The dog and its kinds; a plant that a fish shares its name with; a few other words."""
    nouns = [
        synset(1, "animal"), synset(2, "dog domestic_dog", 1), synset(3, "Poodle poodle_dog", 2), synset(4, "fice", 2),
        synset(5, "cactus"), synset(6, "tuna nopal", 5), synset(7, "tuna", 1), synset(8, "pug", 2),
        synset(9, "wolf", 2), synset(10, "coydog", 2, 11), synset(11, "whelp", 9),
    ]  # fmt: skip
    (tmp_path / "data.noun").write_text("  1 the licence\n" + "".join(nouns))
    index = {
        "animal": [1], "dog": [2], "domestic_dog": [2], "poodle": [3], "poodle_dog": [3], "fice": [4], "cactus": [5],
        "tuna": [6, 7], "nopal": [6], "pug": [8], "wolf": [9], "coydog": [10], "whelp": [11],
    }  # fmt: skip
    lines = [f"{w} n {len(n)} 0 {len(n)} 0 {' '.join(f'{i:08}' for i in n)}\n" for w, n in index.items()]
    (tmp_path / "index.noun").write_text("  1 the licence\n" + "".join(lines))
    senses = [f"{w}%1:05:00:: {i:08} 1 0\n" for w, n in index.items() for i in n]
    senses += ["run%2:38:00:: 00000001 1 7\n", "pug%2:38:00:: 00000002 1 5\n", "grim%3:00:00:: 00000003 1 4\n"]
    (tmp_path / "index.sense").write_text("".join(senses))
    return WordNet(tmp_path, COUNTS | {"nopal": 50})


def test_a_thing_has_the_names_of_its_kinds_the_commonest_first(wordnet: WordNet) -> None:
    kinds = wordnet.kinds({"dog face": ("dog 1",), "wolf": ("wolf 1",), "cactus": ("cactus 1",)})
    names = {thing: wordnet.names(own) for thing, own in kinds.items()}
    # "pug" is a verb more often, nobody says "fice", and a kind of two belongs to the nearer.
    assert names["dog face"] == ["dog", "poodle", "coydog"]
    assert names["wolf"] == ["wolf", "whelp"]
    assert names["cactus"] == ["nopal"]  # "tuna" is a fish as often; "cactus" is in no text here
    assert wordnet.common("1") == ["wolf", "tuna", "dog", "poodle", "coydog", "whelp", "animal", "nopal"]
    assert wordnet.common("2") == ["run", "pug"]


def test_words_that_name_nothing_are_none_of_the_things_names(
    wordnet: WordNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog, *_ = small_sprites().things
    dog = replace(dog, name="dog face", tags=("animal",))
    (tmp_path / "dict").symlink_to(wordnet.folder)
    table = [{"word": word.title(), "count": count} for word, count in COUNTS.items()]
    (tmp_path / "index.json").write_text(json.dumps(table))
    monkeypatch.setattr(thesaurus_module, "fetch", lambda package, folder: tmp_path)
    found = Thesaurus.of([dog], ["grim"], tmp_path)
    assert list(found.captions) == sorted(found.captions)  # in every process, or none finds what another kept
    names = found.names["dog face"]
    assert names[: len(MORE_NAMES["dog face"])] == MORE_NAMES["dog face"]
    assert {"poodle", "coydog"} <= set(names)
    assert not {"dog", "puppy"} & set(names)  # captions have them
    assert (found.nouns, found.verbs, found.adjectives) == (("tuna",), ("running",), ())


@pytest.mark.parametrize(
    ("verb", "participle"),
    [("sit", "sitting"), ("lie", "lying"), ("ride", "riding"), ("see", "seeing"), ("wait", "waiting")],
)
def test_participles(verb: str, participle: str) -> None:
    assert ing(verb) == participle


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("fox", "foxes"),
        ("cat", "cats"),
        ("pony", "ponies"),
        ("bus", "buses"),
        ("key", "keys"),
        ("field mouse", "field mice"),
        ("snowman", "snowmen"),
        ("jeans", "jeans"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


@given(seed=st.integers(0, 10**6))
def test_other_words_say_what_the_caption_says(tokenizer: Tokenizer, seed: int) -> None:
    rng, wording = random.Random(seed), Wording.of(THESAURUS, tokenizer)
    scene = random_scene(rng, small_sprites())
    said, otherwise = wording.said(scene, rng)
    assert (said.white, said.styled) == (otherwise.white, otherwise.styled)
    for placed, name, other in zip(scene.things, said.names, otherwise.names, strict=True):
        assert name in names_of(placed.thing)
        assert other == name or other in THESAURUS.names[placed.thing.name]
    text = wording(scene, rng, otherwise)
    assert all(name in text or plural(name) in text for name in otherwise.names)
    coloured = [placed.colour for placed in scene.things if placed.colour]
    coloured += [colour for colour in scene.background if colour != "white" or len(scene.background) > 1 or said.white]
    for colour in coloured:
        assert any(name in text for name in (colour, *SHADES[colour]))
    ends = {end.strip() for end in text.split(",")} | set(text.split(" on ")) | set(text.split(" against "))
    if said.styled:
        assert any(name in text for name in (*STYLE_WORDS[scene.style], *MORE_STYLES[scene.style]))
    else:
        assert not ends & {*STYLE_WORDS[scene.style], *MORE_STYLES[scene.style]}
    _, other = wording.pair(scene, rng)
    assert not set(words_of(other)) & {word for word in NOTHING if held_out_word(word)}


def test_words_that_are_cut_are_tried_again(tokenizer: Tokenizer) -> None:
    wording = Wording.of(THESAURUS, tokenizer)
    long, tries = "x " * 300, iter(["x " * 300, "x " * 300, "fox", "never"])
    assert wording.whole(lambda: next(tries)) == "fox"
    assert wording.whole(lambda: long) == long  # rather than for ever


def test_words_held_out_are_one_in_ten_and_only_of_those_that_say_nothing(tokenizer: Tokenizer) -> None:
    words = [f"word{i}" for i in range(1000)]
    assert 70 < sum(map(held_out_word, words)) < 130
    shown, kept = (Wording.of(THESAURUS, tokenizer, held_out).thesaurus for held_out in (False, True))
    assert {*shown.nouns, *kept.nouns} == set(NOTHING)
    assert not set(shown.nouns) & set(kept.nouns)
    assert shown.names == kept.names == THESAURUS.names


def test_a_tokenizer_grows_into_its_unused_places(tmp_path: Path) -> None:
    small_ground(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    last = max(vocab.values())
    spare = {f"<|unused{i}|>": last + 1 + i for i in range(4)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | spare))
    texts = ["zyx zyx zyx zyxw", "zyx, qq"]
    grown = grow(tmp_path, texts)
    assert [number for number, _, _ in grown.new] == [last + 1, last + 2, last + 3, last + 4][: len(grown.new)]
    tokens = {number: token for token, number in grown.vocab.items()}
    assert all(tokens[number] == tokens[a] + tokens[b] for number, a, b in grown.new)
    assert {token: number for token, number in grown.vocab.items() if number <= last} == vocab
    assert grow(tmp_path, texts) == grown
    (tmp_path / "out").mkdir()
    write_vocabulary(tmp_path / "out", grown.vocab, grown.merges)
    before, after = Tokenizer.from_folder(tmp_path, 24), Tokenizer.from_folder(tmp_path / "out", 24)
    assert before(["a", "red", "fox"]).tolist() == after(["a", "red", "fox"]).tolist()
    assert after.encode("zyx")[0][1:3] == [grown.vocab["zyx</w>"], after.end]


def test_a_new_token_begins_as_the_mean_of_its_two() -> None:
    embeddings = torch.arange(10.0).view(5, 2)
    begin(embeddings, [(3, 0, 1), (4, 3, 2)])
    assert embeddings.tolist() == [[0, 1], [2, 3], [4, 5], [1, 2], [2.5, 3.5]]


def test_names_of_several_words_are_listed_as_such(tmp_path: Path) -> None:
    small_ground(tmp_path)
    add_words(tmp_path, ["golden retriever", "a"])
    add_words(tmp_path, ["fox"])
    assert (tmp_path / "words.txt").read_text() == "a\nfox\ngolden retriever\n"
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.unknown("A golden retriever, a Fox") == []
    assert tokenizer.unknown("a golden fox, a golden retriever, the retriever") == ["golden", "the", "retriever"]


def test_each_other_name_is_read_as_often(tmp_path: Path) -> None:
    """However often the things are seen, and however many names they have."""
    scenes, rng = small_ground(tmp_path, count=200).latents.scenes, random.Random(0)
    names = {"rocket": ("starship",), "fox": ("vixen", "tod", "reynard"), "unseen": ("word",)}
    draw = evenly(scenes, names)
    drawn = [draw(rng).things[0].thing.name for _ in range(2000)]
    assert set(drawn) == {"rocket", "fox"}
    assert drawn.count("fox") / len(drawn) == pytest.approx(3 / 4, abs=0.04)


def test_encoders_come_to_make_of_other_words_what_they_made_of_captions(tmp_path: Path) -> None:
    """Nearly, in so few steps; and what they made of captions stays."""
    ground = replace(small_ground(tmp_path, count=16), batch=4)
    wording = Wording.of(THESAURUS, ground.tokenizers[0])
    encoders = teach_other_words(ground, wording, [], tmp_path / "words", steps=80, peak=1e-2)
    before, now = Encoders(deepcopy(ground.encoders)), Encoders(encoders)
    rng = random.Random(1)
    pairs = [wording.pair(rng.choice(ground.latents.scenes), rng) for _ in range(200)]
    told, other = [ground.tokenizers[0](list(texts)) for texts in zip(*pairs, strict=True)]

    def error(encoders: Encoders, ids: torch.Tensor) -> float:
        return float((encoders(ids)[1] - before(told)[1]).square().mean())

    with torch.inference_mode():
        assert error(now, other) < 0.8 * error(before, other)
        assert error(now, told) < 0.4 * error(before, other)


def test_names_that_were_learned_in_vain_are_not_listed(tokenizer: Tokenizer) -> None:
    """Encoders here read a prompt as its first letters: those of a space shuttle and of tulips."""

    def encoder(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ids, ids[:, 2:4]

    wording = Wording.of(
        replace(THESAURUS, names={"rocket": ("rockets", "foxglove"), "fox": (), "tulip": ("tulips",)}), tokenizer
    )
    found = understood([encoder, encoder], wording, "cpu")
    assert found.thesaurus.names == {"rocket": ("rockets",), "fox": (), "tulip": ("tulips",)}
    assert "foxglove" not in found.taught()


def test_a_models_folder_gets_the_encoders_the_tokenizer_and_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    ground, seen = small_ground(model), []
    (model / "words.txt").write_text("fox\n")
    monkeypatch.setattr("fulgurite.training.recipe.TEXTS", 50)

    def teach(ground, wording, new, folder, steps):
        seen.append((wording, new, folder, steps))
        return ground.encoders

    monkeypatch.setattr("fulgurite.training.recipe.teach_other_words", teach)
    monkeypatch.setattr("fulgurite.training.recipe.understood", lambda encoders, wording, device: wording)

    def run(thesaurus: Thesaurus) -> Ground:
        words = Wording.of(thesaurus, ground.tokenizers[0])
        return other_words(tmp_path, words, model, tmp_path / "out", PRESETS["cpu"], ground, small_sprites())

    taught = run(THESAURUS)
    assert seen[0][3] == PRESETS["cpu"].words_steps
    assert {path.parent.name for path in (tmp_path / "out").glob("*/model.safetensors")} == {
        "text_encoder",
        "text_encoder_2",
    }
    assert not taught.tokenizers[0].unknown("a fox, foxes, a starship, space shuttles, turquoise")
    assert taught.tokenizers[1].unknown("a space") == ["space"]
    # An interrupted run goes on in the same folder; one with other words begins in another.
    for thesaurus in (THESAURUS, replace(THESAURUS, names={"fox": ("vixen", "reynard")})):
        run(thesaurus)
    folders = [folder for _, _, folder, _ in seen]
    assert folders[0] == folders[1] != folders[2]


@pytest.fixture(scope="module")
def spark() -> Pipeline:
    return Pipeline.load("fulgurite/spark-lightning", steps=4, dtype=torch.float32)


@needs_weights
@pytest.mark.parametrize(
    ("name", "thing"),
    [
        ("poodle", "dog"), ("pug", "dog"), ("feline", "cat"), ("chimp", "monkey"), ("stallion", "horse"),
        ("toad", "frog"), ("cobra", "snake"), ("espresso", "hot beverage"), ("limousine", "automobile"),
        ("airliner", "airplane"), ("galleon", "sailboat"), ("ruby", "gem stone"), ("medal", "trophy"),
        ("droid", "robot"), ("phantom", "ghost"), ("mansion", "house"), ("chopper", "helicopter"),
        ("cheesecake", "birthday cake"), ("goldfish", "tropical fish"),
    ],
)  # fmt: skip
def test_the_embedded_model_knows_names_that_captions_do_not_have(spark: Pipeline, name: str, thing: str) -> None:
    assert not spark.networks.tokenizers[0].unknown(f"a {name}, {plural(name)}")
    things = [each.removesuffix(" face") for each in sorted(FIRST)]
    pooled = torch.stack([spark.encode(f"a {each}")[1] for each in (*things, name)])
    assert things[torch.cdist(pooled[-1:], pooled[:-1]).argmin()] == thing


@needs_weights
@pytest.mark.parametrize(
    ("plain", "wordy"),
    [
        ("a red fox", "a red fox, highly detailed, 8k, masterpiece"),
        ("a penguin", "a professional photograph of a penguin, cinematic lighting, 4k"),
        ("an owl", "an owl asleep in the woods at night"),
        ("a burger", "a delicious juicy burger on a wooden table"),
        ("a house on a blue background", "a cosy house on a blue background, in the style of an old master"),
    ],
)
def test_words_that_say_nothing_change_the_embedded_models_picture_little(
    spark: Pipeline, plain: str, wordy: str
) -> None:
    def pixels(prompt: str) -> torch.Tensor:
        image = spark(prompt, width=256, height=256, num_steps=4, seed=3).image
        return torch.from_numpy(np.array(image)).float()

    wanted, found, other = pixels(plain), pixels(wordy), pixels("a sailboat on a yellow background")
    assert (found - wanted).square().mean() < 0.15 * (other - wanted).square().mean()
