"""SDXL's UNet (Podell et al., arXiv 2307.01952).

Parameter names are those of diffusers' ``UNet2DConditionModel``, so that published checkpoints load as they
are. Everything that a row of the batch needs is an argument: rows may differ in timestep, prompt and sizes.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.models.layers import GEGLU, DotProductAttention, GroupNormSiLU, Upsample, VectorLinear

NAG_TAU = 2.5  # the paper's
NAG_ALPHA = 0.5  # the guided output's share in the blend: the paper's


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet. The defaults are SDXL's."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (0, 2, 10)  # 0: no attention at that resolution
    attention_head_dim: int = 64
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    pooled_dim: int = 1280  # of the pooled prompt state
    norm_num_groups: int = 32


@dataclass(frozen=True)
class AttentionGuidance:
    """Normalized attention guidance (Chen et al., arXiv 2505.21179): cross-attention steered away from a prompt.

    Unlike classifier-free guidance it costs no second evaluation, and few-step models bear it.
    """

    context: Tensor  # what to avoid, as the network's own context
    strength: Tensor  # ``[B]``: 1 leaves a row as it is, to the bit; below 1 the prompt counts for less
    tau: float = NAG_TAU  # how much longer than the unguided output the guided one may be, by L1 norm

    def __call__(self, wanted: Tensor, unwanted: Tensor) -> Tensor:
        """Attention's outputs for both prompts, ``[B, S, D]`` each, to the guided one."""
        strength = self.strength.view(-1, 1, 1).to(wanted.dtype)
        steered = wanted + (strength - 1) * (wanted - unwanted)
        usual, now = (z.abs().sum(dim=-1, keepdim=True) for z in (wanted, steered))
        steered = steered * (self.tau * usual / now.clamp_min(1e-6)).clamp_max(1)
        return torch.where(strength == 1, wanted, torch.lerp(wanted, steered, NAG_ALPHA))


def sinusoidal_embedding(values: Tensor, dim: int) -> Tensor:
    """Values ``[N]`` to cosines and sines ``[N, dim]`` (cosines first), in float32."""
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=values.device) / (dim // 2)
    )
    angles = values.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class EmbeddingMLP(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = VectorLinear(in_dim, dim)
        self.linear_2 = VectorLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Module = VectorLinear(time_dim, out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C, h, w], [B, T]
        h = self.conv1(self.norm1(x))
        h = h + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return h + (self.conv_shortcut(x) if self.changes_channels else x)


class Attention(nn.Module):
    """Self-attention where ``context`` is the input itself, else cross-attention."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.attend = DotProductAttention(head_dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, x: Tensor, context: Tensor, guidance: AttentionGuidance | None = None
    ) -> Tensor:  # [B, S, D], [B, L, C]
        q, k, v = self.project(x, context)
        attended = self.attend(q, k, v)
        if guidance is not None:
            attended = guidance(attended, self.attend(q, *self.keys_values(guidance.context)))
        return self.to_out[0](attended)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values."""
        return self.to_q(x), *self.keys_values(context)

    def keys_values(self, context: Tensor) -> tuple[Tensor, ...]:
        return self.to_k(context), self.to_v(context)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # The identity stands where diffusers has its dropout, so that the names agree.
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, guidance: AttentionGuidance | None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, guidance)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, layers: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.cross_attention_dim, config.attention_head_dim) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, context: Tensor, guidance: AttentionGuidance | None
    ) -> Tensor:  # [B, C, h, w], [B, L, D]
        height = x.shape[2]
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, h * w, C]
        for block in self.transformer_blocks:
            h = block(h, context, guidance)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, (height, -1))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def transformers(channels: int, layers: int, count: int, config: UNetConfig) -> nn.ModuleList:
    return nn.ModuleList(SpatialTransformer(channels, layers, config) for _ in range(count))


class DownBlock(nn.Module):
    def __init__(self, level: int, config: UNetConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        width, layers = widths[level], config.transformer_layers_per_block[level]
        inputs = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock(n, width, widths[0] * 4, config.norm_num_groups) for n in inputs)
        self.has_attention = layers > 0
        if self.has_attention:
            self.attentions = transformers(width, layers, len(inputs), config)
        self.shrinks = level < len(widths) - 1
        if self.shrinks:
            self.downsamplers = nn.ModuleList([Downsample(width)])

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor, guidance: AttentionGuidance | None
    ) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if self.has_attention:
                x = self.attentions[i](x, context, guidance)
            skips.append(x)
        if self.shrinks:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, layers = config.block_out_channels[-1], config.transformer_layers_per_block[-1]
        time_dim = config.block_out_channels[0] * 4
        self.attentions = transformers(width, layers, 1, config)
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time_dim, config.norm_num_groups) for _ in range(2))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, guidance: AttentionGuidance | None) -> Tensor:
        x = self.resnets[0](x, embedding)
        return self.resnets[1](self.attentions[0](x, context, guidance), embedding)


class UpBlock(nn.Module):
    def __init__(self, level: int, config: UNetConfig) -> None:
        super().__init__()
        widths, count = config.block_out_channels, config.layers_per_block + 1
        width, layers = widths[level], config.transformer_layers_per_block[level]
        below = widths[min(level + 1, len(widths) - 1)]
        inputs = [below] + [width] * (count - 1)
        skips = [width] * (count - 1) + [widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(
            ResnetBlock(n + skip, width, widths[0] * 4, config.norm_num_groups)
            for n, skip in zip(inputs, skips, strict=True)
        )
        self.has_attention = layers > 0
        if self.has_attention:
            self.attentions = transformers(width, layers, count, config)
        self.grows = level > 0
        if self.grows:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(
        self, x: Tensor, skips: list[Tensor], embedding: Tensor, context: Tensor, guidance: AttentionGuidance | None
    ) -> Tensor:
        """Takes its skips off the end of ``skips``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)
            if self.has_attention:
                x = self.attentions[i](x, context, guidance)
        # The next skip's size, not twice this one's: latents with odd sides come back to their own size.
        return self.upsamplers[0](x, skips[-1].shape[2:]) if self.grows else x


class UNet(nn.Module):
    """Predicts the noise (or v, or the clean latent: as it was trained) in a noisy latent."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(widths[0], widths[0] * 4)
        self.add_embedding = EmbeddingMLP(config.pooled_dim + 6 * config.addition_time_embed_dim, widths[0] * 4)
        # Of the embedding, for all blocks together; else each projects it for itself (fulgurite.kernels.fused).
        self.shared_projection: nn.Module = nn.Identity()
        # Of a prompt's states, to what ``forward`` takes for them: they are the same at every step.
        self.read: nn.Module = nn.Identity()
        self.down_blocks = nn.ModuleList(DownBlock(i, config) for i in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(i, config) for i in reversed(range(len(widths))))
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        sizes: Tensor,
        guidance: AttentionGuidance | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            x: noisy latents, scaled to unit variance ``[B, C, h, w]``.
            timestep: ``[B]``, 0..999, a row each.
            context: what ``read`` gives of both text encoders' states, side by side ``[B, L, cross_attention_dim]``.
            pooled: the pooled prompt state ``[B, pooled_dim]``.
            sizes: original height and width, crop top and left, target height and width, in pixels ``[B, 6]``.
            guidance: away from which prompts to steer, and how strongly, a row each.

        Returns:
            The prediction ``[B, C, h, w]``.
        """
        x, skips, embedding = self.encode(x, timestep, context, pooled, sizes, guidance)
        for block in self.up_blocks:
            x = block(x, skips, embedding, context, guidance)
        return self.conv_out(self.conv_norm_out(x))

    def encode(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        sizes: Tensor,
        guidance: AttentionGuidance | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The way down and through the middle: its features, what the way up takes from it, and the blocks' embedding.

        The arguments are those of ``forward``, the features of the lowest resolution.
        """
        dtype = x.dtype
        embedding = self.time_embedding(sinusoidal_embedding(timestep, self.config.block_out_channels[0]).to(dtype))
        size_embedding = sinusoidal_embedding(sizes.flatten(), self.config.addition_time_embed_dim)
        size_embedding = size_embedding.view(len(x), -1).to(dtype)
        embedding = embedding + self.add_embedding(torch.cat([pooled, size_embedding], dim=-1))
        embedding = self.shared_projection(F.silu(embedding))

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, embedding, context, guidance)
            skips += more
        return self.mid_block(x, embedding, context, guidance), skips, embedding


@cache
def weights_in(config: UNetConfig) -> int:
    """How many numbers a UNet of these sizes has."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in UNet(config).parameters())
