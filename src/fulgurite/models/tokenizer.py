"""CLIP's byte-pair tokenizer, on the ``tokenizers`` library, from the published ``vocab.json`` and ``merges.txt``."""

import json
import unicodedata
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def clip_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's way of cutting text into tokens, over any vocabulary; an empty one is ready to be trained."""
    bpe = tokenizers.models.BPE(
        vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def words_of(text: str) -> list[str]:
    """Its words, in small letters: letters with their marks, and such as emoji."""
    kinds = {"L", "M", "So"}
    spaced = (
        c if {(kind := unicodedata.category(c)), kind[0]} & kinds else " "
        for c in unicodedata.normalize("NFC", text).lower()
    )
    return "".join(spaced).split()


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens' numbers and the merges, of ``vocab.json`` and ``merges.txt``."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return vocab, [(a, b) for a, b in pairs]


class Tokenizer:
    """Text to rows of token ids: start, the prompt, end, then padding to ``length``.

    ``words`` are those that the text encoders have learned, and names of several ("golden retriever"), whose words need
    not say anything by themselves; None where no list is kept, since they know as good as any.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        length: int = 77,
        pad_token: str = END,
        words: frozenset[str] | None = None,
    ) -> None:
        self.length, self.words = length, words
        self._names: dict[str, list[list[str]]] = {}  # of several words, by their first
        for name in (name.split() for name in words or ()):
            if len(name) > 1:
                self._names.setdefault(name[0], []).append(name)
        self.start, self.end, self.pad = vocab[START], vocab[END], vocab[pad_token]
        self._bpe = clip_bpe(vocab, merges)

    @classmethod
    def from_folder(cls, folder: Path, length: int = 77) -> "Tokenizer":
        """Reads ``vocab.json`` and ``merges.txt``; where they are there, ``tokenizer_config.json``'s pad token, and
        ``words.txt``, a word or a name of several a line.
        """
        vocab, merges = read_vocabulary(folder)
        config = folder / "tokenizer_config.json"
        pad = json.loads(config.read_text(encoding="utf-8")).get("pad_token", END) if config.exists() else END
        pad = pad["content"] if isinstance(pad, dict) else pad
        listed = folder / "words.txt"
        words = frozenset(listed.read_text(encoding="utf-8").splitlines()) if listed.exists() else None
        return cls(vocab, merges, length, pad, words)

    def unknown(self, text: str) -> list[str]:
        """Words that the text encoders never learned, each once, so that they say little or nothing to them.

        Of Latin ones those of more than two letters: such as "in" and "my" say little in any case.
        """
        if self.words is None:
            return []
        words = words_of(text)
        said = [word in self.words or (word.isascii() and len(word) < 3) for word in words]
        for i, word in enumerate(words):
            for name in self._names.get(word, ()):
                if words[i : i + len(name)] == name:
                    said[i : i + len(name)] = [True] * len(name)
        return list(dict.fromkeys(word for word, known in zip(words, said, strict=True) if not known))

    def encode(self, text: str) -> tuple[list[int], bool]:
        """One prompt's ``length`` ids, and whether the prompt was too long and has been cut."""
        # Lone surrogates have no UTF-8, which the byte-level vocabulary is made of: they read as "?".
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._bpe.encode(clean, add_special_tokens=False).ids
        room = self.length - 2
        row = [self.start, *ids[:room], self.end]
        return row + [self.pad] * (self.length - len(row)), len(ids) > room

    def __call__(self, texts: list[str]) -> Tensor:
        """Prompts to token ids ``[B, length]``."""
        return torch.tensor([self.encode(text)[0] for text in texts])
