"""Networks in SDXL's shape with small numbers, ours and the oracle's, for tests to compare.

The oracle is diffusers and transformers; its models are made from the same numbers and random weights.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig as OracleTextConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fulgurite.cards import Card, Weights, card
from fulgurite.models import CLIPTextConfig, TinyDecoderConfig, UNetConfig, VAEConfig
from fulgurite.models.tokenizer import END, START

FLOAT32 = torch.float32

UNET = UNetConfig(
    block_out_channels=(32, 64, 64),
    transformer_layers_per_block=(0, 1, 2),
    attention_head_dim=16,
    cross_attention_dim=80,
    addition_time_embed_dim=16,
    pooled_dim=48,
)
VAE = VAEConfig(block_out_channels=(32, 32, 64), layers_per_block=1)
FAST = TinyDecoderConfig(block_out_channels=(16, 16, 16), num_blocks=(1, 2, 0))
FIRST = CLIPTextConfig(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    eos_token_id=599,
)
SECOND = replace(FIRST, hidden_size=48, num_hidden_layers=4, hidden_act="gelu", projection_dim=48)


def small_card(**changes: object) -> Card:
    """SDXL-Lightning's card with small numbers."""
    lightning = card("bytedance/stable-diffusion-xl-lightning")
    return replace(lightning, unet=UNET, vae=VAE, fast_decoder=FAST, text_encoders=(FIRST, SECOND), **changes)


def local_card(path: Path, **fields: object) -> Card:
    """The same, its weights at a path of this machine."""
    return small_card(weights=Weights(source="local", path=str(path), **{k: str(v) for k, v in fields.items()}))


def unet_settings(config: UNetConfig) -> dict[str, object]:
    """diffusers' arguments for the same UNet."""
    depths, widths = config.transformer_layers_per_block, config.block_out_channels
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in reversed(depths)],
        "layers_per_block": config.layers_per_block,
        "transformer_layers_per_block": [max(n, 1) for n in depths],
        "attention_head_dim": [width // config.attention_head_dim for width in widths],
        "cross_attention_dim": config.cross_attention_dim,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.addition_time_embed_dim,
        "projection_class_embeddings_input_dim": config.pooled_dim + 6 * config.addition_time_embed_dim,
        "norm_num_groups": config.norm_num_groups,
        "use_linear_projection": True,
    }


def vae_settings(config: VAEConfig) -> dict[str, object]:
    count = len(config.block_out_channels)
    return {
        **asdict(config),
        "out_channels": config.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }


def text_settings(config: CLIPTextConfig) -> OracleTextConfig:
    fields = asdict(config) | {"projection_dim": config.projection_dim or config.hidden_size}
    return OracleTextConfig(**fields, bos_token_id=config.eos_token_id - 1, pad_token_id=config.eos_token_id)


def oracle_unet(config: UNetConfig) -> UNet2DConditionModel:
    return UNet2DConditionModel(**unet_settings(config)).eval()


def oracle_vae(config: VAEConfig) -> AutoencoderKL:
    return AutoencoderKL(**vae_settings(config)).eval()


def oracle_fast_decoder(config: TinyDecoderConfig) -> AutoencoderTiny:
    """The decoder, and the encoder that comes with it."""
    widths, blocks = config.block_out_channels, config.num_blocks
    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=tuple(reversed(blocks)),
        num_decoder_blocks=blocks,
    ).eval()


def oracle_text(config: CLIPTextConfig) -> CLIPTextModel | CLIPTextModelWithProjection:
    kind = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
    return kind(text_settings(config)).eval()


def roughened(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in every parameter, the biases and norms too, which fresh networks leave at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network


def published_names(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's tensors under the names of the published files: transformers 5 drops one part in memory."""
    tensors = network.state_dict()
    if isinstance(network, CLIPTextModel):
        return {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return dict(tensors)


def write_tokenizer(folder: Path, pad: str = END) -> None:
    """CLIP's tokenizer over single bytes and a few merges, 600 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("f", "o"), ("fo", "x</w>"), ("c", "a"), ("ca", "t</w>")]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    words += [f"<unused{i}>" for i in range(598 - len(words))] + [START, END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, "model_max_length": 77}))


def saved_pipeline(folder: Path) -> Path:
    """The folder, with a small SDXL in it as diffusers writes one."""
    oracle_pipeline(folder).save_pretrained(folder)
    return folder


def oracle_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """diffusers' pipeline with random weights, and its tokenizers in a folder that is still empty."""
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", pad="!")
    return StableDiffusionXLPipeline(
        vae=roughened(oracle_vae(VAE), seed=1),
        text_encoder=roughened(oracle_text(FIRST), seed=2),
        text_encoder_2=roughened(oracle_text(SECOND), seed=3),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=roughened(oracle_unet(UNET), seed=4),
        scheduler=EulerDiscreteScheduler(  # as SDXL-Lightning's card says
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
        add_watermarker=False,
    )
