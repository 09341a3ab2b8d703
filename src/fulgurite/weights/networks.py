"""A model's networks, together."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fulgurite.models import VAE, CLIPTextEncoder, TinyDecoder, Tokenizer, UNet


@dataclass(frozen=True)
class Base:
    """A UNet that a LoRA was merged into, in its file's precision: for the next LoRA."""

    file: Path
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Networks:
    """Everything between a prompt and its pixels, on one device."""

    tokenizers: tuple[Tokenizer, Tokenizer]
    text_encoders: tuple[CLIPTextEncoder, CLIPTextEncoder]
    unet: UNet
    vae: VAE
    prediction: str  # what the UNet predicts: "epsilon", "v" or "x0"
    base: Base | None = None  # what the UNet is a LoRA on
    fast_decoder: TinyDecoder | None = None  # where the model has one, and it is on this machine
