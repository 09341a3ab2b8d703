"""Layers that the networks share: the plain torch of what a device may have a fused kernel for (fulgurite.kernels)."""

import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormSiLU(nn.GroupNorm):
    """Group normalization, then SiLU: what stands before almost every convolution. ``[B, C, h, w]`` to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class DotProductAttention(nn.Module):
    """Scaled dot-product attention, heads side by side in the last dimension."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries ``[B, S, D]``, keys and values ``[B, L, D]`` to ``[B, S, D]``."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, H, S or L, head_dim]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
