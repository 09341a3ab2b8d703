"""The tokenizer against transformers' CLIPTokenizer, over a vocabulary that the test trains."""

import json
from importlib.resources import files
from itertools import chain
from pathlib import Path

import pytest
import small_sdxl as small
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from fulgurite.cards import card
from fulgurite.models import CLIPTextEncoder, Tokenizer
from fulgurite.models.tokenizer import END, START, clip_bpe
from fulgurite.request import Request, notes, plan
from fulgurite.training.scenes import COLOURS, STYLE_WORDS
from fulgurite.training.words import FAULTS, FILLERS, FIRST, SYNONYMS

SENTENCES = [
    "a red fox jumps over the lazy dog, in the style of a woodcut",
    "futuristic spacecraft, it's 1024 pixels wide, they've drawn it",
    "une forêt brumeuse à l'aube, naïve façade, café",
    "красная лиса в снегу, 赤い狐, 雪の森, 狐狸, الثعلب الأحمر",
    "🦊🚀✨ !!! ... --- (((masterpiece))) [detailed:1.2] <lora:x>",
] * 5

WORDS = st.sampled_from(
    [
        *("fox", "FOX's", "they'll", "I'M", "naïve", "nai\u0308ve", "ﬁre", "ǅ", "İstanbul", "ẞ", "狐", "лиса"),
        *("🦊", "👩‍🚀", "🏳️‍🌈", "1234", "½", "²", "...", "'s", "''", "_", "a_b", "<|endoftext|>", "<|startoftext|>"),
        *("<|ENDOFTEXT|>", "<|endoftext", "\u200b", "\u00a0", "\u3000", "\x85", "\x1c", "\t\n ", "\u0000", "\ufeff"),
        *("e\u0301", "\u0301", "한", "\u1112\u1161\u11ab", "</w>", "Ġ"),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(WORDS, max_size=12).map("".join), st.lists(WORDS, max_size=12).map(" ".join)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A trained vocabulary as published: all bytes, all bytes that end a word, merges, and two special tokens."""
    bpe = clip_bpe({}, [])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=900, show_progress=False, end_of_word_suffix="</w>", initial_alphabet=letters, special_tokens=[]
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = letters + [f"{letter}</w>" for letter in letters]
    words += [word for pair in merges if (word := "".join(pair)) not in words]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, START, END]))}

    path = tmp_path_factory.mktemp("tokenizer")
    (path / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": END, "model_max_length": 77}))
    return path


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def oracle(folder) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def wanted(oracle: CLIPTokenizer, text: str) -> list[int]:
    return oracle(text, padding="max_length", truncation=True, max_length=77)["input_ids"]


@given(text=TEXTS)
@example("")
@example(" ")
@example("a photo of a fox<|endoftext|>and more")
@example("<|startoftext|><|endoftext|>!")
@example("it's  THEY'RE\n\tI'd")
@settings(max_examples=600, deadline=None)
def test_every_text_agrees(ours, oracle, text):
    assert ours.encode(text)[0] == wanted(oracle, text)


def test_words_are_merged_at_all(ours):
    """Agreement would be cheap if the vocabulary had no merges to disagree on."""
    ids = [token for token in ours.encode("a red fox")[0] if token != ours.end]
    assert len(ids) <= 6


@pytest.mark.parametrize("repeats", [74, 75, 76, 77, 200])
def test_long_prompts_are_cut_and_say_so(ours, oracle, repeats):
    text = " ".join("!" * repeats)
    row, cut = ours.encode(text)
    assert row == wanted(oracle, text)
    assert len(row) == 77
    assert row[-1] == ours.end
    assert cut == (repeats > 75)


def test_a_hundred_thousand_characters(ours, oracle):
    row, cut = ours.encode("fox 🦊" * 20_000)
    assert cut
    assert row == wanted(oracle, "fox 🦊" * 20_000)


@pytest.mark.parametrize("text", ["\ud800", "fox \udfff\ud83d fox"])
def test_lone_surrogates_read_as_question_marks(ours, text):
    assert ours.encode(text)[0] == ours.encode("".join("?" if "\ud800" <= c <= "\udfff" else c for c in text))[0]


def test_a_batch_is_a_row_each(ours):
    batch = ours(["fox", "a red fox"])
    assert batch.shape == (2, 77)
    assert batch.dtype == torch.int64
    assert batch[1].tolist() == ours.encode("a red fox")[0]


def test_the_pad_token_of_the_config_is_used(tmp_path):
    small.write_tokenizer(tmp_path, pad="!")
    tokenizer = Tokenizer.from_folder(tmp_path)
    row = tokenizer.encode("fox")[0]
    assert row[-1] == tokenizer.pad != tokenizer.end
    assert row.count(tokenizer.end) == 1

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert Tokenizer.from_folder(tmp_path).encode("fox")[0] == row
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).encode("fox")[0][-1] == tokenizer.end


@torch.inference_mode()
def test_an_end_written_in_the_prompt_ends_it_as_in_the_oracle(tmp_path):
    """The pooled state is that of the first end-of-text, wherever it comes from."""
    small.write_tokenizer(tmp_path)
    theirs = small.roughened(small.oracle_text(small.SECOND))
    encoder = CLIPTextEncoder(small.SECOND)
    encoder.load_state_dict(small.published_names(theirs))
    ids = Tokenizer.from_folder(tmp_path)(["red fox<|endoftext|>cat", "red fox"])
    pooled = encoder(ids)[1]
    torch.testing.assert_close(pooled, theirs(ids).text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-5, rtol=1e-5)


def test_words_that_were_never_learned_are_found_and_named(tmp_path):
    small.write_tokenizer(tmp_path)
    assert Tokenizer.from_folder(tmp_path).unknown("any word") == []  # as SDXL's, which lists none
    (tmp_path / "words.txt").write_text("a\nred\nfox\ncafé\n", encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.unknown("A red Fox in a CAFE\u0301, 42 x.") == []
    assert tokenizer.unknown("a fox's hats, HATS and wolves") == ["hats", "and", "wolves"]
    assert tokenizer.unknown("हिन्दी 狐 🦊!") == ["हिन्दी", "狐", "🦊"]

    spark = card("fulgurite/spark")
    unheard = " ".join(f"word{letter * 50}" for letter in "abcdefghijkl")
    request = Request("a red fox", negative_prompt=unheard, width=256, height=256)
    cut, told = notes(spark, request, plan(spark, request), [tokenizer])
    assert told.startswith("negative_prompt has words that this model never learned: wordaaa")
    assert told.endswith(", ...")
    assert len(told) < 500
    assert "was cut" in cut


def test_the_embedded_model_knows_the_words_that_its_things_are_called():
    tokenizer = Tokenizer.from_folder(Path(str(files("fulgurite"))) / "embedded/spark/tokenizer")
    names = [name for thing in FIRST for name in (thing, *SYNONYMS.get(thing, ()))]
    styles = chain(*(STYLE_WORDS[style] for style in ("3d", "flat", "cartoon", "sticker")))
    assert not tokenizer.unknown(", ".join([*names, *COLOURS, *FILLERS, *FAULTS, *styles]))
    assert tokenizer.unknown("a futuristic spacecraft and an accordion") == ["accordion"]
