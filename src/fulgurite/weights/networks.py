"""A model's networks, together."""

from dataclasses import dataclass

from torch import Tensor

from fulgurite.models import VAE, CLIPTextEncoder, TinyDecoder, Tokenizer, UNet


@dataclass(frozen=True)
class Networks:
    """Everything between a prompt and its pixels, on one device."""

    tokenizers: tuple[Tokenizer, Tokenizer]
    text_encoders: tuple[CLIPTextEncoder, CLIPTextEncoder]
    unet: UNet
    vae: VAE
    prediction: str  # what the UNet predicts: "epsilon", "v" or "x0"
    base: dict[str, Tensor] | None = None  # in its file's precision, what the UNet is a LoRA on: for the next LoRA
    fast_decoder: TinyDecoder | None = None  # where the model has one, and it is on this machine
