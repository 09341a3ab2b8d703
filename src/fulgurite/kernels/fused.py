"""Linear layers of the same input as one, on any device: fewer and larger products.

A network that has them can draw, and no longer be saved in the published layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fulgurite.models.layers import VectorLinear
from fulgurite.models.unet import Attention, ResnetBlock, TransformerBlock, UNet


class FusedSelfAttention(Attention):
    to_qkv: nn.Module

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self.to_qkv(x).chunk(3, dim=-1)


class Columns(nn.Module):
    """A layer's share of what was computed for several at once."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.stop]


class FusedCrossAttention(Attention):
    columns: Columns

    def keys_values(self, context: Tensor) -> tuple[Tensor, ...]:
        return self.columns(context).chunk(2, dim=-1)


class SideBySide(nn.Module):
    """Layers of the same input, their outputs side by side: for weights too large to be joined in passing."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def fuse(unet: UNet) -> None:
    """Joins attention's projections, and those of the prompt and of the timestep's embedding, in place, one by one.

    Keys and values of the prompt are ``unet.read``'s from now on: once a picture instead of at every step.
    """
    keys_values, start = [], 0
    for transformer in [block for block in unet.modules() if isinstance(block, TransformerBlock)]:
        own, cross = transformer.attn1, transformer.attn2
        own.to_qkv, own.__class__ = joined([own.to_q, own.to_k, own.to_v]), FusedSelfAttention
        keys_values.append(joined([cross.to_k, cross.to_v]))
        stop = start + keys_values[-1].out_features
        cross.columns, cross.__class__ = Columns(start, stop), FusedCrossAttention
        del own.to_q, own.to_k, own.to_v, cross.to_k, cross.to_v
        start = stop
    unet.read = SideBySide(keys_values)

    blocks = [block for block in unet.modules() if isinstance(block, ResnetBlock)]
    projections = [block.time_emb_proj for block in blocks if isinstance(block.time_emb_proj, nn.Linear)]
    unet.shared_projection, start = joined(projections), 0
    for block, projection in zip(blocks, projections, strict=True):
        block.time_emb_proj = Columns(start, start + projection.out_features)
        start += projection.out_features


def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose output is theirs, side by side."""
    first, kind = layers[0], VectorLinear if isinstance(layers[0], VectorLinear) else nn.Linear
    with torch.device("meta"):
        layer = kind(first.in_features, sum(part.out_features for part in layers), first.bias is not None)
    layer.weight = nn.Parameter(torch.cat([part.weight for part in layers]), requires_grad=False)
    if first.bias is not None:
        layer.bias = nn.Parameter(torch.cat([part.bias for part in layers]), requires_grad=False)
    return layer
