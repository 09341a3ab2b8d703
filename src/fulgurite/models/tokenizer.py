"""CLIP's byte-pair tokenizer, on the ``tokenizers`` library, from the published ``vocab.json`` and ``merges.txt``."""

import json
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


class Tokenizer:
    """Text to rows of token ids: start, the prompt, end, then padding to ``length``."""

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77, pad_token: str = END
    ) -> None:
        self.length = length
        self.start, self.end, self.pad = vocab[START], vocab[END], vocab[pad_token]
        self._bpe = clip_bpe(vocab, merges)

    @classmethod
    def from_folder(cls, folder: Path, length: int = 77) -> "Tokenizer":
        """Reads ``vocab.json``, ``merges.txt`` and, where there is one, the pad token of ``tokenizer_config.json``."""
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        config = folder / "tokenizer_config.json"
        pad = json.loads(config.read_text(encoding="utf-8")).get("pad_token", END) if config.exists() else END
        return cls(vocab, [(a, b) for a, b in pairs], length, pad["content"] if isinstance(pad, dict) else pad)

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
