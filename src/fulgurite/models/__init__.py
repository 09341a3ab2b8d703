"""The networks: SDXL's UNet, VAE, tiny decoder, CLIP text encoders and tokenizer. They import torch and know nobody."""

from fulgurite.models.clip import CLIPTextConfig, CLIPTextEncoder
from fulgurite.models.tiny_decoder import TinyDecoder, TinyDecoderConfig
from fulgurite.models.tokenizer import Tokenizer
from fulgurite.models.unet import AttentionGuidance, UNet, UNetConfig
from fulgurite.models.vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "AttentionGuidance",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "TinyDecoder",
    "TinyDecoderConfig",
    "Tokenizer",
    "UNet",
    "UNetConfig",
    "VAEConfig",
]
