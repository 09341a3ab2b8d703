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


class FusedCrossAttention(Attention):
    to_kv: nn.Module

    def keys_values(self, context: Tensor) -> tuple[Tensor, ...]:
        return self.to_kv(context).chunk(2, dim=-1)


class Columns(nn.Module):
    """A layer's share of what was computed for several at once."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


def fuse(unet: UNet) -> None:
    """Joins attention's projections, and those of the timestep's embedding, in place and one by one."""
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            own, cross = block.attn1, block.attn2
            own.to_qkv, own.__class__ = joined([own.to_q, own.to_k, own.to_v]), FusedSelfAttention
            cross.to_kv, cross.__class__ = joined([cross.to_k, cross.to_v]), FusedCrossAttention
            del own.to_q, own.to_k, own.to_v, cross.to_k, cross.to_v

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
