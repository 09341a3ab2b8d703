"""Layers that the networks share: the plain torch of what a device may have a fused kernel for (fulgurite.kernels)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormSiLU(nn.GroupNorm):
    """Group normalization, then SiLU: what stands before almost every convolution. ``[B, C, h, w]`` to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class VectorLinear(nn.Linear):
    """A linear layer of one vector a row, ``[B, in]`` to ``[B, out]``.

    It always runs on whole sixteens of rows. Kernels for few rows differ with their number in the order of their sums,
    and in half precision so seldom in their results that looking for it would not find it: this way a row's bits cannot
    depend on the rows beside it.
    """

    ROWS = 16

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, -len(x) % self.ROWS)))[: len(x)]


class DotProductAttention(nn.Module):
    """Scaled dot-product attention, heads side by side in the last dimension."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries ``[B, S, D]``, keys and values ``[B, L, D]`` to ``[B, S, D]``."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, H, S or L, head_dim]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a convolution. ``[B, C, h, w]`` to ``[B, C, 2 h, 2 w]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """``size``: the height and width to come to instead, one less than twice these at most."""
        return self.conv(F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


class GEGLU(nn.Module):
    """A linear layer gated by another (Shazeer, arXiv 2002.05202); the one projection holds values, then gates."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)
